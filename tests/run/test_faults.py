"""A run on a machine whose memory is too small for its batches."""

import pytest
import torch
from timm.models.vision_transformer import Block

from kcrprune import pipeline
from kcrprune.artifact.artifact import open_model
from kcrprune.events import Note
from kcrprune.run import saving
from tests.pipeline.test_compress import SHORT, save
from tests.tiny import TINY, Tiny, relative_error

STAGES = {
    *("measure dense", "balance", "order", "score", "search"),
    *("refit (first look, scores)", "refit (first look, search)", "refit (scores)"),
    *("held-out images", "evaluate", "recover", "measure pruned"),
}


@pytest.fixture
def memory(monkeypatch):
    """How many images a block has memory for."""
    forward, room = Block.forward, {"images": 3}

    def short_of_memory(self, x, *args, **options):
        if len(x) > room["images"]:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} images")
        return forward(self, x, *args, **options)

    monkeypatch.setattr(Block, "forward", short_of_memory)
    return room


def test_every_stage_takes_its_batches_in_parts_where_memory_runs_out_and_says_so(
    memory, finished, tmp_path, tiny_vit: Tiny, monkeypatch
):
    def untimed(*_):
        raise torch.OutOfMemoryError("CUDA out of memory: 64 images")

    monkeypatch.setattr(saving, "speed_of", untimed)
    told: list[object] = []
    checkpoint = save(TINY[0], tmp_path / "dense.safetensors")
    result = pipeline.compress(checkpoint, SHORT.model_copy(update={"bench": True}), tmp_path / "run", told.append)
    assert result.speed is None
    assert Note("memory ran out, so the networks are not timed", warning=True) in told
    notes = [event.text for event in told if isinstance(event, Note) and "do not fit the memory" in event.text]
    assert {note.partition(": ")[0] for note in notes} == STAGES
    memory["images"] = 8
    images = tiny_vit.images(4)
    with torch.no_grad():
        found, whole, dense = (open_model(path).model(images) for path in (result.folder, finished, checkpoint))
    assert relative_error(found, dense) < 1.5 * relative_error(whole, dense)
