"""Images that cannot be read: those that decide are refused before anything is trained, others are replaced."""

import itertools
import re
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
from kcrprune.training.images.unreadable import ATTEMPTS, Replaced, Replacing, some
from kcrprune.training.images.workers import told
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


@pytest.mark.parametrize(("images", "most"), [(1, 1), (99, 1), (100, 1), (101, 2), (1000, 10), (1001, 11)])
def test_one_image_in_a_hundred_may_be_replaced_and_one_in_any_case(images: int, most: int):
    replaced = Replaced(images)
    replaced.note_([f"{number}.png" for number in range(most)])
    replaced.note_(["", "0.png", "0.png"])
    assert len(replaced.names) == most, "a name counts once"
    with pytest.raises(DataError, match=rf"^more than 1% of {images:,} images cannot be read: 0\.png"):
        replaced.note_(["more.png"])


def test_what_was_replaced_is_told_in_a_sentence_or_not_at_all():
    assert Replaced(2000).told("recover") is None
    assert Replaced(2000, ["a", "b"]).told("recover") == (
        "recover: 2 of 2,000 images cannot be read and others took their place: a, b"
    )
    assert some(str(number) for number in range(5)) == "0, 1, 2, 3, 4"
    assert some(str(number) for number in range(1234)) == "0, 1, 2, 3, 4, ... (1,234)"


def test_which_image_takes_a_place_follows_from_the_seed_the_part_and_the_index():
    bad = tuple(range(0, 20, 2))

    def takers(seed: int = 0, what: str = "recover") -> list[int]:
        return [Replacing(Damaged(*bad), seed, what)[index][1] for index in bad]

    assert takers() == takers()
    assert all(other % 2 for other in takers())
    assert len({tuple(each) for each in (takers(), takers(1), takers(what="calibration"))}) == 3
    assert len(set(takers())) > 1
    image, label, name = Replacing(Damaged(4), 0, "x")[3]
    assert (int(image), label, name) == (3, 3, "")
    assert Replacing(Damaged(4), 0, "x")[4][2] == "4.png"
    assert len(Replacing(Damaged(), 0, "x")) == 20


def test_so_many_others_are_tried_and_the_first_complaint_is_told():
    tried: list[int] = []

    class NoneOfThem(Damaged):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            tried.append(index)
            raise ImageError(f"{index} is no image", str(index))

    with pytest.raises(ImageError, match=r"^7 is no image$"):
        Replacing(NoneOfThem(), 0, "x")[7]
    assert len(tried) == 1 + ATTEMPTS


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("DataLoader worker is killed by signal: Bus error. It is possible"),
            "more shared memory than /dev/shm",
        ),
        (RuntimeError("unable to open shared memory object </torch_1_2>"), "docker run --shm-size 2g"),
        (OSError(24, "Too many open files"), r"raise ulimit -n \(\[Errno 24\] Too many open files\)$"),
        (RuntimeError("received 0 items of ancdata"), "more open files than are allowed"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "was killed, as happens where memory"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "fewer --workers, --workers 0 or a smaller"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "no more processes that load images can be started"),
        (OSError(12, "Cannot allocate memory"), "no more processes that load images can be started here"),
        (MemoryError("of numpy"), "^memory ran out in a process that loads images; give fewer --workers"),
    ],
)
def test_what_becomes_of_processes_that_load_is_told_with_the_way_out(error: BaseException, words: str):
    found = told(error, 2)
    assert found is not None
    assert re.search(words, str(found))
    assert "\n" not in str(found)
    assert told(error, 0) is None, "there are none"
    assert told(ZeroDivisionError("x"), 2) is None
