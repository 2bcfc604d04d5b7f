"""Which files are images, what their pixels mean, and which class of a network their folder is."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.plan import Preprocessing
from kcrprune.training.images.decode import decoded, in_mode
from kcrprune.training.images.files import image_files
from kcrprune.training.images.folders import open_folder
from kcrprune.training.images.labels import match_classes
from kcrprune.training.images.sets import Images, open_evaluation, open_images

PREPROCESSING = Preprocessing(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)


def write(path: Path, colour: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour, 0, 0)).save(path)


def write_classes(folder: Path, *names: str, each: int = 2) -> Path:
    for name in names:
        for index in range(each):
            write(folder / name / f"{index}.png", 20 * len(name))
    return folder


def opened(folder: Path, classes: int, names: tuple[str, ...] | None = None, **options: Any) -> Images:
    return open_images(RunConfig(data=str(folder), workers=0, **options), PREPROCESSING, classes, names)


def labels_of(dataset: Any) -> list[int]:
    return [int(dataset[index][1]) for index in range(len(dataset))]


RAMP = np.linspace(0, 1, 1600).reshape(40, 40)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_the_8_bits_of_the_same_picture(tmp_path: Path, suffix: str):
    wide, narrow = tmp_path / f"16.{suffix}", tmp_path / "8.png"
    Image.fromarray((RAMP * 65535).astype("uint16")).save(wide)
    Image.fromarray((RAMP * 255).round().astype("uint8")).save(narrow)
    for mode in ("L", "RGB"):
        found, expected = (
            np.asarray(in_mode(decoded(path.open("rb"), str(path)), mode, str(path))).astype(int)
            for path in (wide, narrow)
        )
        assert np.abs(found - expected).max() <= 1
        assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize(("kind", "mode"), [("float32", "F"), ("int32", "I")])
def test_pixels_of_an_unknown_range_are_refused_with_their_mode(tmp_path: Path, kind: str, mode: str):
    (tmp_path / "a").mkdir()
    Image.fromarray((RAMP * 1000).astype(kind)).save(tmp_path / "a" / "1.tif")
    with pytest.raises(DataError, match=rf"1\.tif has pixels of 32 bits \(mode {mode}\), which do not tell black"):
        open_evaluation(str(tmp_path), PREPROCESSING, 1)


@pytest.mark.parametrize("suffix", ["webp", "tif", "tiff", "bmp", "gif", "jp2", "JPEG", "ppm", "jfif"])
def test_what_pillow_reads_is_an_image(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (16, 16)).save(path, format="JPEG" if suffix == "jfif" else None)
    assert image_files(tmp_path).names == [path.name]


def test_the_first_folder_is_the_class_and_deeper_ones_belong_to_it(tmp_path: Path):
    for name in ("cat/1.png", "cat/old/x/3.png", "dog/cat/2.png", "cat/10.png"):
        write(tmp_path / name)
    source = open_folder(tmp_path, None, 3)
    assert source.class_names == ("cat", "dog")
    assert image_files(tmp_path).names == ["cat/1.png", "cat/10.png", "cat/old/x/3.png", "dog/cat/2.png"]
    assert [source.read(i)[1] for i in range(4)] == [0, 0, 0, 1]


def other_files(folder: Path) -> Path:
    write_classes(folder, "cat", "dog")
    for name in ("cat/notes.txt", "dog/list.txt", "dog/movie.mpg", "README", "cat/._0.png", "cat/.thumbs/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_what_was_passed_over_is_told_with_its_reason(tmp_path: Path):
    folder = other_files(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, ".")
    assert image_files(tmp_path / "images.tar").names == image_files(folder).names
    notes = opened(folder, 2).notes
    assert notes == (f"{folder}: 6 files were passed over (2 .txt, 2 hidden, 1 .mpg, 1 without a suffix)",)
    (packed,) = opened(tmp_path / "images.tar", 2).notes
    assert packed.startswith(f"{tmp_path / 'images.tar'}: 6 files were passed over (")
    (tmp_path / "map.txt").write_text("dog\n")
    mapped = open_folder(folder, str(tmp_path / "map.txt"), 3)
    assert mapped.class_names == ("dog",)
    assert mapped.told is not None
    assert "2 in folders that the class map lacks" in mapped.told


def test_nothing_but_other_files_is_no_data(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 files were passed over \(1 .txt\): no image is there"):
        open_folder(tmp_path, None, 3)


def test_a_tar_file_is_read_by_several_at_once_and_a_damaged_one_is_named(tmp_path: Path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as archive:
        for index in range(3):
            data = io.BytesIO()
            Image.new("L", (16, 16), 50 * index).save(data, "PNG")
            info = tarfile.TarInfo(f"a/{index}.png")
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))
    source = open_folder(path, None, 1)
    first, second = source.items[0][0], source.items[2][0]
    assert [np.asarray(Image.open(file)).max() for file in (second, first)] == [100, 0]
    source.probe(1)
    with source.items[1][0] as file:
        assert file.read() == Path(path).read_bytes()[file.raw.start :][: file.raw.size]  # type: ignore[attr-defined]
    broken = bytearray(path.read_bytes())
    broken[path.read_bytes().index(b"IDAT", 2000)] ^= 1
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r"images\.tar/a/\d\.png is not an image that can be read"):
        [open_folder(path, None, 1).read(index) for index in range(3)]
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"images\.tar cannot be read"):
        open_folder(path, None, 1)


@pytest.mark.parametrize("target", ["cat", ".."])
def test_a_folder_that_is_met_twice_is_refused(tmp_path: Path, target: str):
    folder = write_classes(tmp_path / "images", "cat")
    (folder / "kitty").symlink_to(folder / target, target_is_directory=True)
    with pytest.raises(DataError, match=r"by a link; its images would count twice"):
        open_folder(folder if target == "cat" else tmp_path, None, 3)


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path):
    write_classes(tmp_path / "elsewhere", "cat")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "kitty").symlink_to(tmp_path / "elsewhere" / "cat")
    assert open_folder(tmp_path / "images", None, 3).class_names == ("kitty",)


@pytest.mark.parametrize("kind", ["pipe", "link to nothing"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str):
    path = write_classes(tmp_path / "images", "cat") / "cat" / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"x\.png is no regular file"):
        open_folder(tmp_path / "images", None, 3)


NAMES = ("zebra", "Polar Bear", "ant")


@pytest.mark.parametrize("bear", ["Polar Bear", "polar_bear", "polar-bear"])
def test_folders_are_the_classes_of_their_name(tmp_path: Path, bear: str):
    write_classes(tmp_path / "train", "ant", bear, "zebra", each=1)
    write_classes(tmp_path / "val", "zebra", bear, each=1)
    images = opened(tmp_path, 3, NAMES)
    expected = {"ant": 2, bear: 1, "zebra": 0}
    order = sorted(expected, key=str.lower)
    assert labels_of(images.calibrate) == [expected[name] for name in order]
    assert labels_of(images.evaluate) == [expected[name] for name in order if name != "ant"]
    assert images.class_names is not None
    assert images.class_names == ("zebra", bear, "ant")


@pytest.mark.parametrize("labels", [True, False])
def test_what_is_held_out_of_the_training_images_is_matched_as_they_are(tmp_path: Path, labels: bool):
    write_classes(tmp_path, "ant", "polar_bear", "zebra", each=20)
    images = opened(tmp_path, 3, NAMES, labels=labels)
    dataset: Any = images.evaluate
    names = [Path(dataset.dataset.source.items.files.names[index]).parent.name for index in dataset.indices]
    assert labels_of(dataset) == [{"zebra": 0, "polar_bear": 1, "ant": 2}[name] for name in names]
    assert len(set(names)) > 1


def test_some_of_the_classes_suffice_to_evaluate_and_not_to_train(tmp_path: Path):
    write_classes(tmp_path, "zebra", each=1)
    assert labels_of(open_evaluation(str(tmp_path), PREPROCESSING, 3, class_names=NAMES)) == [0]
    with pytest.raises(DataError, match="has 1 classes and the network 3"):
        opened(tmp_path, 3, NAMES)
    with pytest.raises(DataError, match="has 1 classes and the network 3"):
        open_evaluation(str(tmp_path), PREPROCESSING, 3)


def test_other_names_are_refused_with_both_lists_unless_a_map_decides(tmp_path: Path):
    write_classes(tmp_path / "images", "ant", "cow", "dog", each=1)
    with pytest.raises(
        DataError, match=r"classes ant, cow, dog and the network Polar Bear, ant, zebra; give them equal"
    ):
        open_evaluation(str(tmp_path / "images"), PREPROCESSING, 3, class_names=NAMES)
    (tmp_path / "map.txt").write_text("dog\ncow\nant\n")
    by_map = open_evaluation(
        str(tmp_path / "images"), PREPROCESSING, 3, class_map=str(tmp_path / "map.txt"), class_names=NAMES
    )
    assert labels_of(by_map) == [2, 1, 0]
    assert not opened(tmp_path / "images", 3, NAMES, labels=False).labelled


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (["a", "b"], ["LABEL_0", "LABEL_1"], None),
        (["0", "1"], ["cat", "dog"], None),
        (["n00000001", "n00000002"], ["tench", "goldfish"], None),
        (["2", "0"], ["0", "1", "2"], {"2": 2, "0": 0}),
        (["n00000001"], ["n00000001", "n00000002"], {"n00000001": 0}),
        (["A b"], ["a_b", "c"], {"A b": 0}),
    ],
)
def test_names_that_say_nothing_leave_the_order(found, wanted, expected):
    assert match_classes(found, wanted, "here") == expected


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (["cat", "dog"], ["cat", "cow"]),
        (["tench"], ["n00000001"]),
        (["n00000001"], ["n00000002"]),
        (["a b"], ["a_b", "A-B"]),  # which of the two?
        (["a b", "a_b"], ["A b", "c"]),
    ],
)
def test_names_that_do_not_match_are_refused(found, wanted):
    with pytest.raises(DataError, match="here has the classes"):
        match_classes(found, wanted, "here")


@given(st.lists(st.text("abc_ ", min_size=1), unique=True, min_size=1), st.randoms())
def test_equal_names_match_in_any_order(names, random):
    shuffled = random.sample(names, len(names))
    assert match_classes(shuffled, names, "here") == {name: names.index(name) for name in names}


def test_images_without_labels_cannot_be_evaluated_and_a_run_says_so(tmp_path: Path):
    write_classes(tmp_path / "train", "a", "b")
    write(tmp_path / "val" / "1.png")
    with pytest.raises(DataError, match="val have no labels to evaluate by; give each class a folder"):
        open_evaluation(str(tmp_path), PREPROCESSING, 2)
    images = opened(tmp_path, 2)
    assert images.labelled
    assert images.notes[0].startswith("top-1 cannot be measured: the images of ")
