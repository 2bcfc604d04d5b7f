"""Names of the hub: what is fetched of a repository, what the cache spares, and every way in which it fails."""

import json
import shutil
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.hub import fetched
from kcrprune.cli.app import run
from kcrprune.errors import CheckpointError, FetchError

COMMIT, OLDER = "a" * 40, "b" * 40
REPOSITORY = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SIZE: Any = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one who fetches sees of it; `server.files` are those of each (repository, commit)."""

    server: Any

    def do_GET(self):
        self.server.asked.append(self.path)
        words = self.path.partition("?")[0].strip("/").split("/")
        if self.server.status != 200:
            self._answer(self.server.status, b"", {})
        elif words[:2] == ["api", "models"]:
            self._tell("/".join(words[2:4]), *(words[4:6] or ("revision", "main")))
        else:
            self._send("/".join(words[:2]), words[3], "/".join(words[4:]))

    def do_HEAD(self):
        self.do_GET()

    def _tell(self, repository, what, revision):
        commit = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
        files = self.server.files.get((repository, commit))
        if files is None:
            known = any(repository == name for name, _ in self.server.files)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "Not here"})
            return
        tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
        told = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        self._answer(200, json.dumps(tree if what == "tree" else told).encode(), {"Content-Type": "application/json"})

    def _send(self, repository, commit, name):
        content = self.server.files[repository, commit][name]
        self._answer(200, content, {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": commit})

    def _answer(self, status, content, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.status = {}, [], 200
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The files of a repository of timm: a tiny ViT, what is said of it, and what nobody should fetch."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SIZE)
    folder = tmp_path_factory.mktemp("tiny")
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"num_heads": 2}}
    files = {
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "config.json": json.dumps(config).encode(),
        "pytorch_model.bin": b"the same again",
        "modeling.py": b"raise SystemExit('remote code ran')",
        "onnx/model.onnx": b"",
    }
    return model, files


def resolved(hub):
    return {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}


@pytest.mark.parametrize(
    "name", [REPOSITORY, "timm/vit_tiny_patch16_224", f"hf-hub:{REPOSITORY}", f"{REPOSITORY}@main"]
)
def test_a_name_opens_as_its_files_do_and_no_code_is_fetched(hub, published, name):
    model, files = published
    hub.files[REPOSITORY, COMMIT] = files
    opened = open_model(Path(name))
    assert opened.fetched
    assert (opened.fetched.repository, opened.fetched.revision) == (REPOSITORY, COMMIT)
    assert resolved(hub) == {"model.safetensors", "config.json"}
    assert opened.notes[0].endswith(COMMIT)
    assert opened.file_bytes == len(files["model.safetensors"])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(opened.model(images), model.eval()(images))


def test_what_the_cache_has_is_not_fetched_again_and_serves_where_the_hub_does_not(hub, published):
    hub.files[REPOSITORY, COMMIT] = published[1]
    first = fetched(Path(REPOSITORY))
    hub.asked.clear()
    assert fetched(Path(REPOSITORY)) == first
    assert not resolved(hub)
    hub.status = 503
    late = fetched(Path(REPOSITORY))
    assert first
    assert late
    assert (late.weights, late.revision, late.newest) == (first.weights, COMMIT, False)
    assert "not reached" in late.note
    hub.asked.clear()
    pinned = fetched(Path(f"{REPOSITORY}@{COMMIT}"))
    assert pinned
    assert pinned.newest
    assert not hub.asked, "a commit stays what it is"


def test_a_revision_is_its_own(hub, published):
    hub.files[REPOSITORY, COMMIT] = {}
    hub.files[REPOSITORY, OLDER] = published[1]
    found = fetched(Path(f"hf-hub:{REPOSITORY}@v1"))
    assert found
    assert found.source == f"{REPOSITORY}@{OLDER}"
    with pytest.raises(CheckpointError, match="no weights"):
        fetched(Path(REPOSITORY))
    with pytest.raises(CheckpointError, match=r"gives no .*@v9"):
        fetched(Path(f"{REPOSITORY}@v9"))


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["a.py", "pytorch_model.bin", "training_args.bin"], {"pytorch_model.bin"}),
        (["open_clip_model.safetensors", "pytorch_model.bin"], {"open_clip_model.safetensors"}),
        (["pytorch_model.bin", "vit.safetensors"], {"vit.safetensors"}),
        (["only.pth", "preprocessor_config.json", "b/other.pth"], {"only.pth", "preprocessor_config.json"}),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
    ],
)
def test_which_files_are_taken(hub, names, taken):
    hub.files["some/one", COMMIT] = dict.fromkeys(names, b"{}")
    assert fetched(Path("hf-hub:some/one"))
    assert resolved(hub) == taken


def test_several_checkpoints_are_named(hub):
    hub.files["some/one", COMMIT] = {"a.pth": b"", "b.pth": b""}
    with pytest.raises(CheckpointError, match=r"a\.pth, b\.pth.*hf download some/one FILE"):
        fetched(Path("hf-hub:some/one"))


def test_a_file_or_folder_of_that_name_wins(hub, published):
    shutil.copytree(Path(__file__).parent, Path(REPOSITORY))
    assert fetched(Path(REPOSITORY)) is None
    assert fetched(Path("timm/model.pth")) is None
    assert not hub.asked


@pytest.mark.parametrize("name", ["hf-hub:no/body", "hf-hub:some/one@--x", "hf-hub:no/bo--dy"])
def test_a_name_that_nobody_has(hub, name):
    with pytest.raises(CheckpointError, match="Hugging Face hub"):
        fetched(Path(name))


def test_weights_that_timm_has_elsewhere(hub):
    with pytest.raises(CheckpointError, match=r"https://\S+\.pth"):
        fetched(Path("timm/gcvit_tiny.in1k"))


@pytest.mark.parametrize("command", ["compress", "inspect", "report", "export", "evaluate"])
def test_without_a_connection_there_is_a_sentence_with_the_way_out(hub, monkeypatch, capsys, command):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    more = ["--data", "."] if command == "evaluate" else []
    assert run([command, REPOSITORY, *more]) == FetchError.exit_code
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "HF_HUB_OFFLINE is set" in sentence
    assert f"hf download {REPOSITORY}" in sentence
    assert not list(Path().iterdir())


def test_a_run_of_a_name_is_called_after_it_and_says_which_revision_it_was(hub, published, capsys):
    hub.files[REPOSITORY, COMMIT] = published[1]
    words = ["--generated-images", "8", "--calibration-images", "4", "--score-images", "4", "--batch-size", "4"]
    again = ["compress", REPOSITORY, "--recipe", "no-train", "--workers", "0", "--device", "cpu", *words]
    assert run(again) == 0
    [folder] = Path("kcrprune-runs").iterdir()
    assert folder.name == f"{REPOSITORY.removeprefix('timm/')}-0.7"
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert {"name": REPOSITORY, "hub": REPOSITORY, "revision": COMMIT}.items() <= record["input"].items()
    assert f"compress {REPOSITORY} " in record["command"]
    hub.status = 503
    capsys.readouterr()
    assert run(again) == 0
    assert "finished" in capsys.readouterr().err
    assert [folder] == list(Path("kcrprune-runs").iterdir())
    assert run(["export", REPOSITORY, "--format", "timm"]) == 0
    assert Path(f"{REPOSITORY.removeprefix('timm/')}-timm").is_dir(), "and not in the cache"
