"""The round trip law, over every family: saved and loaded in one fresh process, equal outputs."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.plan import Preprocessing
from kcrprune.surgery.narrow import cut_
from tests.tiny import TINY, Tiny, nested_plan

READ = """
import sys, pathlib, torch, kcrprune
torch.set_num_threads(1)
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    images, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        assert torch.equal(kcrprune.load(folder)(images), expected), folder.name
assert not any(name.startswith(("kcrprune.training", "kcrprune.pipeline")) for name in sys.modules)
print(len(list(pathlib.Path(sys.argv[1]).iterdir())))
"""


@torch.no_grad()
def test_a_fresh_process_without_training_code_computes_the_same(finished: Path, tiny_vit: Tiny, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "run")
    torch.save((tiny_vit.images(), open_model(finished).model(tiny_vit.images())), tmp_path / "run" / "expected.pt")
    for tiny in TINY:
        folder = tmp_path / tiny.label
        folder.mkdir()
        model = tiny.model()
        plan = nested_plan(model, tiny.architecture.name, 1)
        pruned = cut_(model, plan).eval()
        save_model(
            folder / "model.safetensors",
            pruned,
            architecture=tiny.architecture,
            plan=plan,
            preprocessing=Preprocessing(input_size=tiny.input_size, mean=(0.5,) * 3, std=(0.5,) * 3),
            class_names=None,
            record={},
        )
        torch.save((tiny.images(), pruned(tiny.images())), folder / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert int(done.stdout) == len(TINY) + 1
