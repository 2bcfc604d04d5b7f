import itertools
import tarfile
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch.utils.data import IterableDataset

from kcrprune.config import RunConfig
from kcrprune.errors import DataError
from kcrprune.plan import Preprocessing
from kcrprune.training.images import named
from kcrprune.training.images.batches import in_order
from kcrprune.training.images.parts import sample, split
from kcrprune.training.images.sets import open_evaluation, open_images
from kcrprune.training.images.transforms import evaluation_transform, training_transform

PREPROCESSING = Preprocessing(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def pixels(seed, size=(20, 24)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_images(folder, counts, size=(20, 24)):
    """Images of different content: counts[c] of them in folder/c."""
    for seed, (name, number) in enumerate((name, n) for name, count in counts.items() for n in range(count)):
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed, size)).save(path)
    return folder


def opened(folder, classes=2, **options) -> Any:
    return open_images(RunConfig(data=str(folder), workers=0, **options), PREPROCESSING, classes)


def everything(dataset):
    return [(image, int(label)) for image, label in (dataset[i] for i in range(len(dataset)))]


def assert_equal_images(found, expected):
    assert len(found) == len(expected)
    for (image, label), (other, other_label) in zip(found, expected, strict=True):
        assert torch.equal(image, other)
        assert label == other_label


@pytest.mark.parametrize("evaluation", ["validation", "val", "test"])
def test_a_folder_with_both_sets(tmp_path, evaluation):
    write_images(tmp_path / "train", {"cat": 3, "dog": 2})
    write_images(tmp_path / evaluation, {"dog": 2, "cat": 1})
    images = opened(tmp_path)
    assert (len(images.train), len(images.calibrate), len(images.evaluate)) == (5, 5, 3)
    assert images.labelled
    assert not images.generated
    assert images.class_names == ("cat", "dog")
    assert [label for _, label in everything(images.calibrate)] == [0, 0, 0, 1, 1]
    assert [label for _, label in everything(images.evaluate)] == [0, 1, 1]


def timms(**options) -> Any:
    return create_transform(**options)


def test_evaluation_images_are_what_timms_own_transform_makes(tmp_path):
    write_images(tmp_path, {"cat": 2, "dog": 2})
    preprocessing = PREPROCESSING.model_copy(update={"crop_pct": 0.8})
    transform = timms(
        input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic", crop_pct=0.8
    )
    expected = [(transform(Image.fromarray(pixels(seed))), seed // 2) for seed in range(4)]
    assert_equal_images(everything(open_evaluation(str(tmp_path), preprocessing, 2)), expected)


def test_an_image_of_the_input_size_is_not_scaled():
    preprocessing = PREPROCESSING.model_copy(update={"crop_pct": 0.8})
    image = pixels(0, (16, 16))
    scaled = torch.from_numpy(image).permute(2, 0, 1) / 255
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    expected = (scaled - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert torch.allclose(evaluation_transform(preprocessing)(Image.fromarray(image)), expected)


def test_training_images_are_shifted_and_flipped_but_not_scaled(tmp_path):
    write_images(tmp_path / "train", {"cat": 1, "dog": 1}, size=(16, 16))
    write_images(tmp_path / "val", {"cat": 1, "dog": 1}, size=(16, 16))
    images = opened(tmp_path)
    plain = images.calibrate[0][0]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2), mode="reflect")
    possible = [padded[:, y : y + 16, x : x + 16] for y, x in itertools.product(range(5), range(5))]
    possible += [image.flip(2) for image in possible]
    drawn = [images.train[0][0] for _ in range(40)]
    seen = {next(i for i, other in enumerate(possible) if torch.equal(image, other)) for image in drawn}
    assert len(seen) > 10


def test_without_an_evaluation_set_a_part_is_held_out(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 10})
    images = opened(tmp_path)
    assert (len(images.train), len(images.calibrate), len(images.evaluate)) == (18, 18, 2)
    assert "held out" in images.description
    kept, held_out = everything(images.calibrate), everything(images.evaluate)
    assert all(not torch.equal(image, other) for image, _ in kept for other, _ in held_out)
    assert [label for _, label in everything(images.train)] == [label for _, label in kept]
    assert_equal_images(everything(opened(tmp_path).evaluate), held_out)


def test_a_single_image_is_trained_on_and_nothing_evaluated(tmp_path):
    images = opened(write_images(tmp_path, {"": 1}))
    assert len(images.train) == 1
    assert images.evaluate is None


def test_a_flat_folder_has_no_labels(tmp_path):
    images = opened(write_images(tmp_path, {"": 12}))
    assert not images.labelled
    assert images.class_names is None
    assert {label for _, label in everything(images.calibrate)} == {-1}


@pytest.mark.parametrize(("options", "classes"), [({"labels": False}, 2), ({"labels": False}, 1000), ({}, 0)])
def test_labels_may_be_ignored(tmp_path, options, classes):
    images = opened(write_images(tmp_path, {"cat": 5, "dog": 6}), classes, **options)
    assert not images.labelled
    assert {label for _, label in everything(images.calibrate)} == {-1}


@pytest.mark.parametrize(("classes", "known"), [(2, True), (3, False)])
def test_ignored_labels_still_measure_a_run_where_they_fit(tmp_path, classes, known):
    write_images(tmp_path / "train", {"cat": 5, "dog": 5})
    write_images(tmp_path / "val", {"cat": 1, "dog": 1})
    for folder in (tmp_path, tmp_path / "train"):  # with an evaluation set, and with a part held out
        labels = [label for _, label in everything(opened(folder, classes, labels=False).evaluate)]
        assert all((label >= 0) is known for label in labels)


def test_a_class_missing_in_the_evaluation_set_shifts_no_label(tmp_path):
    write_images(tmp_path / "train", {"ant": 1, "bee": 1, "cat": 1})
    write_images(tmp_path / "val", {"ant": 1, "cat": 2})
    assert [label for _, label in everything(opened(tmp_path, 3).evaluate)] == [0, 2, 2]


def test_a_class_map_gives_the_labels(tmp_path):
    folder = write_images(tmp_path / "images", {"cat": 1, "dog": 1})
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    dataset = open_evaluation(str(folder), PREPROCESSING, 2, class_map=str(tmp_path / "map.txt"))
    assert [label for _, label in everything(dataset)] == [1, 0]


def test_grey_networks_get_grey_images(tmp_path):
    preprocessing = Preprocessing(input_size=(1, 16, 16), mean=(0.5,), std=(0.5,))
    write_images(tmp_path, {"cat": 1, "dog": 1})
    assert open_evaluation(str(tmp_path), preprocessing, 2)[0][0].shape == (1, 16, 16)
    generated = open_images(RunConfig(generated_images=2), preprocessing, 2)
    assert generated.train[0][0].shape == (1, 16, 16)


def test_without_data_images_are_generated():
    images: Any = open_images(RunConfig(generated_images=5), PREPROCESSING, 1000)
    assert images.generated
    assert not images.labelled
    assert len(images.train) == len(images.calibrate) == 5
    again = open_images(RunConfig(generated_images=5), PREPROCESSING, 1000)
    assert_equal_images(everything(images.train), everything(again.calibrate))
    image, label = images.evaluate[0]
    assert label == -1
    assert all(not torch.equal(image, other) for other, _ in everything(images.train))


@pytest.mark.parametrize(("counts", "labels"), [({"cat": 5, "dog": 5}, {0, 1}), ({"": 5}, {-1})])
def test_a_tar_file_holds_what_its_folder_holds(tmp_path, counts, labels):
    folder = write_images(tmp_path / "images", counts)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, ".")
    packed, plain = (everything(opened(tmp_path / name).calibrate) for name in ("images.tar", "images"))
    assert_equal_images(packed, plain)
    assert {label for _, label in packed} == labels


def test_a_dataset_of_torchvision_by_name(tmp_path):
    write_images(tmp_path / "train", {"cat": 2, "dog": 2})
    by_name: Any = open_images(
        RunConfig(data=str(tmp_path / "train"), dataset="torch/image_folder", val_split="", workers=0), PREPROCESSING, 2
    )
    assert_equal_images(everything(by_name.calibrate), everything(opened(tmp_path / "train").calibrate))


def test_a_stream_is_read_once_for_training_and_in_order_for_evaluation(tmp_path, monkeypatch):
    class Numbers(IterableDataset):
        def __iter__(self):
            return ((Image.fromarray(pixels(seed, (16, 16))), seed % 2) for seed in range(6))

    monkeypatch.setattr(named, "create_dataset", lambda *_, **__: Numbers())
    images: Any = open_images(RunConfig(dataset="wds/numbers", val_split="", workers=0), PREPROCESSING, 2)
    assert (len(images.train), len(images.evaluate)) == (5, 1)
    dataset = open_evaluation(None, PREPROCESSING, 2, dataset="wds/numbers")
    tensors, labels = next(iter(in_order(dataset, 6)))
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    expected = [evaluation_transform(PREPROCESSING)(Image.fromarray(pixels(seed, (16, 16)))) for seed in range(6)]
    assert torch.equal(tensors, torch.stack(expected))


def test_parts_are_disjoint_and_complete():
    dataset = list(range(50))
    first, second = (list(part) for part in split(dataset, 0.7, 3, "gates"))  # type: ignore[arg-type]
    assert (len(first), len(second)) == (35, 15)
    assert sorted([*first, *second]) == dataset
    assert list(split(dataset, 0.7, 3, "gates")[0]) == first  # type: ignore[arg-type]
    assert list(split(dataset, 0.7, 4, "gates")[0]) != first  # type: ignore[arg-type]
    assert list(split(dataset, 0.7, 3, "held out")[0]) != first  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (7, 7), (50, 20)])
def test_a_sample_holds_no_image_twice(count, expected):
    drawn: Any = list(sample(list(range(20)), count, 0, "scoring"))  # type: ignore[arg-type]
    assert len(drawn) == len(set(drawn)) == expected


def broken_image(folder):
    (write_images(folder, {"cat": 2, "dog": 2}) / "cat" / "1.png").write_text("<html>not found</html>")


def truncated_image(folder):
    path = write_images(folder, {"cat": 2, "dog": 2}) / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:200])


WRONG = {
    "missing": (lambda folder: None, "is not there"),
    "empty": (lambda folder: folder.mkdir(), "no image is there"),
    "a file": (lambda folder: folder.write_text("x"), "is a file"),
    "no image": (broken_image, "1.png is not an image"),
    "too many classes": (lambda folder: write_images(folder, {"a": 1, "b": 1, "c": 1}), "3 classes and the network 2"),
    "images beside classes": (lambda folder: write_images(folder, {"": 1, "a": 1}), "beside its class folders"),
    "evaluation only": (lambda folder: write_images(folder / "val", {"a": 1, "b": 1}), "no folder 'train'"),
    "another class": (
        lambda folder: (write_images(folder / "train", {"a": 1, "b": 1}), write_images(folder / "val", {"z": 1})),
        "has the classes z and the network a, b",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_data_is_refused_in_one_sentence(tmp_path, make, message):
    make(tmp_path / "images")
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "images")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_dataset_and_an_unknown_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="torch/nonsense"):
        open_images(RunConfig(dataset="torch/nonsense"), PREPROCESSING, 2)
    write_images(tmp_path, {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="no folder 'third'"):
        open_evaluation(str(tmp_path), PREPROCESSING, 2, split="third")


def test_evaluation_does_not_take_training_images_for_it(tmp_path):
    write_images(tmp_path / "train", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="no folder 'validation'"):
        open_evaluation(str(tmp_path), PREPROCESSING, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_when_it_is_read(tmp_path, workers):
    truncated_image(tmp_path)
    dataset = open_evaluation(str(tmp_path), PREPROCESSING, 2)
    with pytest.raises(DataError, match=r"^\S*1\.png is not an image that can be read") as caught:
        list(in_order(dataset, 2, workers=workers))
    assert "\n" not in str(caught.value)


def test_channels_that_no_image_has_are_refused(tmp_path):
    preprocessing = Preprocessing(input_size=(5, 16, 16), mean=(0.5,) * 5, std=(0.5,) * 5)
    write_images(tmp_path, {"cat": 1, "dog": 1})
    for config in (RunConfig(data=str(tmp_path)), RunConfig()):
        with pytest.raises(DataError, match="5 channels"):
            open_images(config, preprocessing, 2)


def test_preprocessing_of_a_timm_network_is_taken_as_timm_resolves_it():
    resolved = resolve_data_config({}, model=timm.create_model("deit_tiny_patch16_224"))
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    preprocessing = Preprocessing(**{name: resolved[name] for name in names})
    image = Image.fromarray(pixels(0, (300, 400)))
    assert torch.equal(evaluation_transform(preprocessing)(image), timms(**resolved)(image))


@pytest.mark.parametrize(
    ("changes", "padding"),
    [
        ({}, 2),  # of 16 pixels an eighth
        ({"crop_pct": 0.9}, 1),  # a tenth lies around the crop, 0.9 pixels on each side
        ({"crop_pct": 0.5}, 0),  # more than the shift
        ({"input_size": (3, 8, 32)}, 1),  # of the shorter side
        ({"input_size": (3, 32, 8), "crop_pct": 0.5}, 0),
    ],
)
@pytest.mark.parametrize("hflip", [0.0, 0.25])
def test_a_training_image_is_shifted_by_an_eighth_less_what_the_crop_cuts_off(changes, padding, hflip):
    prepared = PREPROCESSING.model_copy(update=changes)
    found: Any = training_transform(prepared, hflip)
    resize, crop, flip, *rest = found.other.transforms
    size = prepared.input_size[1:]
    assert (crop.size, crop.padding, flip.p, crop.pad_if_needed, crop.padding_mode) == (
        size,
        padding,
        hflip,
        True,
        "reflect",
    )
    plain: Any = evaluation_transform(prepared)
    assert [type(step) for step in (resize, *rest)] == [
        type(step) for step in plain.other.transforms if "Crop" not in str(step)
    ]
    same_crop, same_flip, *_ = found.same.transforms
    assert (same_crop.padding, same_flip.p) == (round(min(size) / 8), hflip)


@pytest.mark.parametrize(("size", "same"), [((16, 24), True), ((24, 16), False), ((16, 16), False)])
def test_an_image_of_the_inputs_height_and_width_is_left_as_it_is(size, same):
    prepared = PREPROCESSING.model_copy(update={"input_size": (3, *size)})
    transform: Any = evaluation_transform(prepared)
    chosen = []
    for name in ("same", "other"):
        object.__setattr__(transform, name, lambda image, name=name: chosen.append(name))
    transform(Image.new("RGB", (24, 16)))
    assert chosen == ["same" if same else "other"]


@pytest.mark.parametrize(("share", "first"), [(0.0, 0), (0.5, 10), (0.74, 15), (0.76, 15), (1.0, 20)])
def test_parts_keep_the_order_and_are_drawn_alike_under_one_name(share, first):
    dataset: Any = list(range(20))
    mine, other = split(dataset, share, 0, "held out")
    a, b = [list(part.indices) for part in (mine, other)]  # type: ignore[attr-defined]
    assert (a, b) == (sorted(a), sorted(b))
    assert (len(a), sorted(a + b)) == (first, list(range(20)))
    again = [list(part.indices) for part in split([None] * 20, share, 0, "held out")]  # type: ignore[attr-defined,arg-type]
    assert again == [a, b]
    if 0 < share < 1:
        assert list(split(dataset, share, 1, "held out")[0].indices) != a  # type: ignore[attr-defined]
        assert list(split(dataset, share, 0, "gates")[0].indices) != a  # type: ignore[attr-defined]


@pytest.mark.parametrize(("count", "held_out"), [(8, 1), (100, None)])
def test_generated_images_have_further_ones_to_measure_agreement_on(count, held_out):
    from kcrprune.training.images.sets import GENERATED_HELD_OUT

    images: Any = open_images(RunConfig(generated_images=count, workers=0), PREPROCESSING, 2)
    further = held_out or round(count * GENERATED_HELD_OUT)
    assert (len(images.train), len(images.calibrate), len(images.evaluate)) == (count, count, further)
    assert (images.labelled, images.generated, images.class_names) == (False, True, None)
    assert set(images.train.indices).isdisjoint(images.evaluate.indices)
    four = {"input_size": (4, 16, 16), "mean": (0.5,) * 4, "std": (0.5,) * 4}
    with pytest.raises(DataError, match="images of 4 channels cannot be generated; name a dataset"):
        open_images(RunConfig(generated_images=4, workers=0), PREPROCESSING.model_copy(update=four), 2)
