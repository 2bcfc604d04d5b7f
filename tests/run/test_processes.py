"""A run that two processes share is the run of one: its plan, its sums, its weights; and one that dies ends it.

Both processes are started once, and all that is looked at comes of that.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes

from kcrprune import pipeline, processes
from kcrprune.artifact.artifact import open_model
from kcrprune.errors import LostProcessError
from kcrprune.events import Note, StageStarted, ignore
from kcrprune.run.folder import RECORD, STORE
from kcrprune.run.store import TENSORS
from kcrprune.training.precision import open_accelerator
from tests.pipeline.test_compress import SHORT, save
from tests.tiny import TINY, Tiny, relative_error

# more tokens than inputs and a firm ridge, since what is nearly singular makes much of rounding errors, and a low rate,
# since Adam makes a whole step of a gradient near zero, whose sign they decide
FIRM = {"lr": 5e-5, "generated_images": 96, "calibration_images": 75, "score_images": 50, "refit_ridge": 0.1}
CONFIG = SHORT.model_copy(update=FIRM)
BEFORE = ("dense", "balance", "score")  # the stages before the first step of an optimiser
# every batch of 8 is two of 4 for the two processes, and nothing is trained before the cut
EVEN = CONFIG.model_copy(update={"calibration_images": 72, "score_images": 48, "search_steps": 0, "recover_steps": 2})


def told_to(rank: int, port: int) -> dict[str, str]:
    """The variables by which a launcher says that two processes are one run."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in told.items()}


def start(act: Callable[[int, Path, int], None], folder: Path) -> None:
    """Two processes that do so, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = "fork" in torch.multiprocessing.get_all_start_methods()  # spares each the import of torch
    start_processes(act, (folder, port), nprocs=2, start_method="fork" if fork else "spawn")


def share(rank: int, folder: Path, port: int) -> None:
    """What one of the two processes does: a run that ends well, and one whose second process dies."""
    torch.set_num_threads(1)
    os.environ.update(told_to(rank, port))
    result = pipeline.compress(folder / "dense.safetensors", CONFIG, folder / "two", ignore)
    (folder / f"{rank}.json").write_text(result.comparison.model_dump_json())

    def die(event: object) -> None:
        if rank == 1 and event == StageStarted("recover", 2):
            os._exit(0)

    try:
        pipeline.compress(folder / "dense.safetensors", EVEN, folder / "three", die)
    except LostProcessError as error:
        (folder / "lost.txt").write_text(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    checkpoint = save(TINY[0], folder / "dense.safetensors")
    start(share, folder)
    pipeline.compress(checkpoint, CONFIG, folder / "alone" / "one", ignore)
    in_fours = EVEN.model_copy(update={"batch_size": 4, "search_weight_lr": 0.0, "recover_steps": 0})
    pipeline.compress(checkpoint, in_fours, folder / "alone" / "in fours", ignore)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return folder / "alone" / "one", folder / "two"


def test_the_plan_is_the_same_and_the_outputs_are_near(runs, tiny_vit: Tiny):
    plans = [(run / "plan.json").read_bytes() for run in runs]
    assert plans[0] == plans[1]
    images = tiny_vit.images(4)
    with torch.no_grad():
        one, two = (open_model(run).model(images) for run in runs)
    assert relative_error(two, one) < 1e-3


def errors(stage, *runs):
    """Of every tensor that a stage of two runs has left."""
    [one, two] = [load_file(next((run / STORE).glob(f"{stage}-*")) / TENSORS) for run in runs]
    assert one.keys() == two.keys()
    assert one
    return {name: relative_error(two[name].double(), tensor.double()) for name, tensor in one.items()}


@pytest.mark.parametrize("stage", BEFORE)
def test_sums_and_weights_before_the_first_step_are_the_same(runs, stage):
    for name, error in errors(stage, *runs).items():
        bound = 1e-5 if name.startswith("/innovations") else 1e-6  # of systems that make more of rounding
        assert error < bound, name


@pytest.mark.parametrize("stage", ["balance", "score", "cut"])
def test_they_differ_from_one_process_by_the_rounding_of_batches_of_another_size_alone(folder, stage):
    assert max(errors(stage, folder / "alone" / "in fours", folder / "three").values()) < 1e-7


def test_all_processes_end_with_the_report_of_the_first(folder):
    both = [(folder / f"{rank}.json").read_text() for rank in (0, 1)]
    assert both[0] == both[1]
    assert "75 are asked for" not in both[0], "images are counted over all processes"


def test_what_is_sent_is_counted_and_is_sums_weights_and_gradients(runs):
    one, two = (json.loads((run / RECORD).read_text()) for run in runs)
    assert (one["processes"], one["sent_bytes"]) == (1, {})
    assert two["processes"] == 2
    weights = 4 * 33_000
    assert two["sent_bytes"]["balance"] == pytest.approx(2 * 2 * 2 * 2 * 12 * 12 * 8 + weights, rel=0.1)
    assert two["sent_bytes"]["recover"] == pytest.approx(3 * weights + weights, rel=0.25)  # three steps; what is cut


def wait_in_vain(rank: int, folder: Path, port: int) -> None:
    """What one of two processes does of which the second one hangs, when patience is short."""
    os.environ.update(told_to(rank, port))
    processes.PATIENCE = timedelta(seconds=2)  # type: ignore[misc]
    open_accelerator("cpu", "fp32", shared=True)
    processes.summed(torch.ones(1))
    if rank == 1:
        time.sleep(4)
        os._exit(0)
    with pytest.raises(LostProcessError, match="another of the 2 processes has ended or does not answer") as lost:
        processes.summed(torch.ones(1))
    (folder / "hung.txt").write_text(f"exit code {lost.value.exit_code}")


def test_a_process_that_hangs_ends_the_run_when_patience_does(tmp_path):
    start(wait_in_vain, tmp_path)
    assert (tmp_path / "hung.txt").read_text() == "exit code 10"


def test_a_process_that_dies_ends_the_run_in_a_sentence_and_the_run_goes_on_without_it(folder):
    sentence = (folder / "lost.txt").read_text()
    assert sentence.startswith("another of the 2 processes has ended or does not answer (")
    assert sentence.endswith("the same command goes on from it, with as many processes or fewer")
    told: list[object] = []
    pipeline.compress(folder / "dense.safetensors", EVEN, folder / "three", told.append)
    assert any(isinstance(event, Note) and "refit (scores)" in event.text for event in told)
    assert StageStarted("recover", 2) in told
    assert StageStarted("balance") not in told
