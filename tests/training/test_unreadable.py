"""Images that cannot be read: those that decide are refused before anything is trained, others are replaced."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from kcrprune.config import RunConfig
from kcrprune.errors import DataError, ImageError
from kcrprune.plan import Preprocessing
from kcrprune.training.images import checked
from kcrprune.training.images.batches import Batches
from kcrprune.training.images.folders import open_folder
from kcrprune.training.images.sets import Images, open_evaluation, open_images
from kcrprune.training.images.source import Source
from kcrprune.training.parts import divide

PREPROCESSING = Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
COUNT = 40


class Damaged(Dataset):
    """Numbers as images, some of which cannot be read."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise ImageError(f"{index}.png is no image", f"{index}.png")
        return torch.rand(()) + index, index


def drawn(batches: Batches, start: int, stop: int) -> list[list[float]]:
    return [images.tolist() for images, _ in itertools.islice(batches.from_step(start), stop - start)]


def flat(lists: list[list[float]]) -> list[float]:
    return list(itertools.chain(*lists))


def test_another_image_takes_the_place_whatever_the_workers_and_the_first_step():
    def batches(workers: int = 0, *bad: int) -> Batches:
        return Batches(Damaged(*bad), 4, seed=0, stage="recover", workers=workers)

    whole, sound = batches(0, 7), drawn(batches(), 0, 10)
    expected = drawn(whole, 0, 10)
    assert whole.replaced.names == ["7.png"]
    assert drawn(batches(2, 7), 0, 10) == expected
    assert drawn(batches(1, 7), 3, 10) == expected[3:]
    changed = [(old, new) for old, new in zip(flat(sound), flat(expected), strict=True) if old != new]
    assert {int(old) for old, _ in changed} == {7}
    assert len({int(new) for _, new in changed}) == 1, "the same one in each epoch"
    assert all(old % 1 == pytest.approx(new % 1, abs=1e-5) for old, new in changed), "augmented as the first would be"


@pytest.mark.parametrize("workers", [0, 1])
def test_beyond_one_in_a_hundred_the_run_ends_with_their_names(workers: int):
    batches = Batches(Damaged(3, 11), 20, seed=0, stage="recover", workers=workers)
    with pytest.raises(
        DataError, match=r"more than 1% of 20 images cannot be read: (3|11)\.png, (3|11)\.png; remove them"
    ):
        drawn(batches, 0, 1)


def test_where_all_are_lost_the_first_sentence_is_told():
    with pytest.raises(DataError, match=r"^\d+\.png is no image$"):
        drawn(Batches(Damaged(*range(20)), 4, seed=0, stage="recover", workers=1), 0, 1)


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed in range(COUNT):
        noise(tmp_path / "train" / "ab"[seed % 2] / f"{seed}.png", seed)
    for seed in range(4):
        noise(tmp_path / "val" / "ab"[seed % 2] / f"{seed}.png", seed)
    return tmp_path


def config(photos: Path, **options: Any) -> RunConfig:
    sizes = {"calibration_images": 1000, "score_images": 8, "batch_size": 8, "workers": 0}
    return RunConfig.model_validate({"data": str(photos), **sizes, **options})


def opened(photos: Path) -> Images:
    return open_images(config(photos), PREPROCESSING, 2)


def cut_short(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-60])
    return path


@pytest.mark.parametrize("few", [0, 1000])
def test_every_header_is_read_and_all_that_are_none_are_named(photos: Path, few: int, monkeypatch):
    monkeypatch.setattr(checked, "FEW", few)
    monkeypatch.setattr(checked, "AT_ONCE", 16)
    for name in ("train/a/4.png", "train/b/31.png"):
        (photos / name).write_text("<html>")
    options = config(photos, workers=1)
    with pytest.raises(DataError, match=r"2 of 40 images cannot be read \(\S*4\.png, \S*31\.png\); remove them"):
        open_images(options, PREPROCESSING, 2)
    (photos / "val" / "b" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^\S*3\.png is not an image that can be read"):
        open_evaluation(str(photos), PREPROCESSING, 2)


def source_of(dataset: Any) -> Source:
    while not hasattr(dataset, "source"):
        dataset = dataset.dataset
    return dataset.source


def test_a_damaged_image_that_decides_is_refused_and_any_other_replaced(photos: Path):
    parts = divide(opened(photos), config(photos))
    held: Any = parts.held_out.dataset
    files = source_of(held).items.files  # type: ignore[attr-defined]
    decides = files.names[held.indices[0]]
    other = next(name for index, name in enumerate(files.names) if index not in held.indices)
    before = torch.cat(parts.calibration)
    cut_short(files.root / other)
    again = divide(opened(photos), config(photos))
    assert again.replaced.names == [str(files.root / other)]
    assert ((torch.cat(again.calibration) != before).flatten(1).any(1)).sum() == 1
    list(again.training)
    assert again.training.replaced.told("recover") == (
        f"recover: 1 of 32 images cannot be read and others took their place: {files.root / other}"
    )
    (files.root / other).unlink()  # gone meanwhile: the same kind
    list(again.training)
    cut_short(files.root / decides)
    (files.root / other).write_bytes((files.root / files.names[held.indices[1]]).read_bytes())
    with pytest.raises(DataError, match=rf"^{files.root / decides} is not an image that can be read"):
        divide(opened(photos), config(photos))


def test_a_reader_that_raises_what_it_likes_is_told_in_our_sentence(photos: Path, monkeypatch):
    source = open_folder(photos / "train", None, 3)
    monkeypatch.setattr(Image, "open", lambda file: {}[file])
    with pytest.raises(ImageError, match=r"a/0\.png is not an image that can be read") as caught:
        source.read(0)
    assert caught.value.name.endswith("a/0.png")
