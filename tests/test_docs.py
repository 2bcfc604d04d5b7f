"""The documents tell the truth about the program: commands, verbs, links, the option reference."""

import ast
import copy
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import timm
import torch
from typer import TyperException
from typer.main import get_command

import kcrprune
from kcrprune import families
from kcrprune.artifact.artifact import save_model
from kcrprune.checkpoints import signatures
from kcrprune.checkpoints.dense import open_dense
from kcrprune.cli.app import app
from kcrprune.measure.macs import count_macs
from kcrprune.method.cost import MacCost
from kcrprune.pipeline.demo import ARCHITECTURE, PREPROCESSING
from kcrprune.surgery.certificate import certificate
from kcrprune.surgery.gated import harden_
from kcrprune.surgery.narrow import cut_
from tests.tiny import gated, random_plan, relative_error

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page, *languages):
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(text):
    """The kcrprune command lines of a console block, each as its words, without what a shell redirects."""
    joined = text.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\||>", line)]
    return [shlex.split(part)[1:] for part in parts if re.match(r"(\.venv/bin/)?kcrprune\b", part)]


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def parse(words):
    """Parses a command line without running it."""
    group = get_command(app)
    if words[0].startswith("-"):
        return group.make_context("kcrprune", words, resilient_parsing=True)
    command = group.get_command(None, words[0])  # type: ignore[attr-defined]
    assert command is not None, words
    return command.make_context(words[0], words[1:], resilient_parsing="--help" in words)


SHOWN = [(page.name, words) for page in PAGES for body in blocks(page, "console") for words in commands(body)]


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_every_command_that_is_shown_exists(page, words):
    parse(words)


def test_a_command_that_does_not_exist_is_found():
    [words] = commands("$ kcrprune compress vit.pth --target-ratio 0.5 > log.txt\n")
    with pytest.raises(TyperException, match="--target-ratio"):
        parse(words)


def test_the_readme_shows_every_command():
    readme = {words[0] for body in blocks(ROOT / "README.md", "console") for words in commands(body)}
    assert readme >= set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_use_what_exists(page):
    for body in blocks(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kcrprune":
                assert node.attr in kcrprune.__all__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def test_the_option_reference_is_up_to_date():
    reference = runpy.run_path(str(ROOT / "docs" / "cli_reference.py"))
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == reference["page"](), "run docs/cli_reference.py"


def test_the_architecture_names_every_unit_and_only_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(kcrprune/[\w./]+)`", text))
    assert all((ROOT / path).exists() for path in named)
    units = {path for path in (ROOT / "kcrprune").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {path.name for path in units} - {"__main__.py"} <= {path.split("/")[1] for path in named}


def test_the_loop_of_the_training_page_runs(tmp_path, monkeypatch):
    """On a cut network in place of the demo's."""
    monkeypatch.chdir(tmp_path)
    architecture = ARCHITECTURE.model_copy(update={"arguments": {**ARCHITECTURE.arguments, "depth": 1}})
    model = families.build(architecture)
    plan = random_plan(model, architecture.name, 1)
    stated: dict = {"architecture": architecture, "preprocessing": PREPROCESSING, "class_names": tuple("0123456789")}
    save_model(tmp_path / "demo" / "dense.safetensors", model, plan=None, record={}, **stated)
    save_model(tmp_path / "demo" / "run" / "model.safetensors", cut_(model, plan), plan=plan, record={}, **stated)
    exec("\n".join(blocks(ROOT / "docs" / "training.md", "python")), {})  # our own page
    [cut, mine, again] = (kcrprune.load(name).eval() for name in ("demo/run", "mine", "mine-again"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(mine(images), again(images))
        assert not torch.equal(mine(images), cut(images))
    graph = onnx.load("mine.onnx")
    assert (graph.opset_import[0].version, graph.ir_version) == (17, 8)


def test_the_page_on_networks_in_memory_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec("\n".join(blocks(ROOT / "docs" / "in-memory.md", "python")), found)  # our own page
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found["again"](images).logits, found["result"].model(images).logits)
    listing = kcrprune.groups(found["GatedMlp"](8, 16), rules=found["rules"])
    assert [(group.axis, group.width) for group in listing.groups] == [("mlp_hidden", 16)]


@pytest.fixture
def toy(monkeypatch):
    """The toy family of docs/adding-a-family.md, added as the page says."""
    found: dict = {"__name__": "toy"}
    monkeypatch.setitem(sys.modules, "toy", SimpleNamespace(__dict__=found))
    for body in blocks(ROOT / "docs" / "adding-a-family.md", "python"):
        exec(body, found)  # our own page
    monkeypatch.setitem(families.RULES, found["PairMlp"], found["pair_rule"])
    model = timm.create_model("pair_vit_tiny", num_classes=5)
    signature = runpy.run_path(str(ROOT / "docs" / "networks.py"))["signature_of"](model)
    table = signatures.table() | {"pair_vit_tiny": signature}
    monkeypatch.setattr(signatures, "table", lambda: table)
    return model.eval()


@torch.no_grad()
def test_the_toy_family_of_the_docs_is_certified_cut_and_opened(toy, tmp_path):
    images = torch.randn(2, 3, 32, 32)
    groups, plan = families.groups_of(toy), random_plan(toy, "pair_vit_tiny", 1)
    assert {group.axis for group in groups if ".mlp" in group.site} == {"mlp_io", "mlp_hidden"}
    assert set(certificate(toy, groups, plan, images).values()) == {0.0}
    masked = copy.deepcopy(toy).double()
    harden_(gated(masked), plan)
    pruned = cut_(copy.deepcopy(toy).double(), plan)
    assert relative_error(pruned(images.double()), masked(images.double())) <= 1e-10
    cost = MacCost.of(toy, families.contract_of(toy, images[:1]), count_macs(toy, (3, 32, 32)))
    assert cost.predicted(plan) == count_macs(pruned.float(), (3, 32, 32))
    torch.save(toy.state_dict(), tmp_path / "pair.pth")
    opened = open_dense(tmp_path / "pair.pth")
    assert (opened.architecture.family, opened.architecture.name) == ("toy", "pair_vit_tiny")
    assert torch.equal(opened.model(images), toy(images))
