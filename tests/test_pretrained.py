"""The benchmark of pretrained networks: int8 files lifted, packed and read again; what embeddings are worth."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
SCRIPTS = ("common", "embedded", "fetch", "int8_networks", "packed", "pretrained")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def int8_graph(path, weights, scales):
    """x W1 + b, then W2 without a bias, as a quantiser of ONNX Runtime writes them; weights (outputs, inputs)."""
    nodes, given, value = [], [numpy_helper.from_array(np.zeros(3, np.float32), "vision_model.fc1.bias")], "x"
    given.append(numpy_helper.from_array(np.ones(2, np.float32), "vision_model.norm.weight"))
    for number, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        zero = np.zeros(len(scale), np.int8)
        for name, tensor in (("quantized", weight.T), ("zero_point", zero), ("scale", scale)):
            given.append(numpy_helper.from_array(np.ascontiguousarray(tensor), f"w{number}_{name}"))
        nodes.append(helper.make_node("MatMulInteger", [value, f"w{number}_quantized"], [f"m{number}"]))
        nodes.append(helper.make_node("Mul", [f"m{number}", f"w{number}_scale"], [f"y{number}"]))
        value = f"y{number}"
        if number == 0:
            nodes.append(helper.make_node("Add", ["vision_model.fc1.bias", value], ["z"]))
            value = "z"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", value)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], given)), str(path))


@pytest.fixture
def lifted(tmp_path, monkeypatch):
    """The tensors of a small int8 file, and what they are in float32."""
    import int8_networks  # type: ignore[import-not-found]

    generator = np.random.default_rng(0)
    weights = [generator.integers(-127, 128, shape, dtype=np.int8) for shape in ((3, 4), (5, 3))]
    scales = [generator.random(len(weight), dtype=np.float32) for weight in weights]
    int8_graph(tmp_path / "file.onnx", weights, scales)
    monkeypatch.setattr(int8_networks.Published, "fetched", lambda self, cache: cache / "file.onnx")
    return int8_networks.lifted("clip", tmp_path), [np.diag(s) @ w for s, w in zip(scales, weights, strict=True)]


def test_a_lifted_network_has_the_weights_of_its_file(lifted):
    from int8_networks import dequantised  # type: ignore[import-not-found]

    tensors, expected = lifted
    found = dequantised(tensors)
    assert set(found) == {f"vision_model.{name}" for name in ("fc1.bias", "fc1.weight", "norm.weight")} | {
        "visual_projection.weight"
    }
    np.testing.assert_allclose(found["vision_model.fc1.weight"], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found["visual_projection.weight"], expected[1], rtol=1e-6)
    assert all(value.dtype == np.float32 for value in found.values())


@pytest.fixture
def pack(tmp_path, monkeypatch, lifted):
    """A packed folder in pieces of 1,000 bytes, its images and its classes."""
    import packed  # type: ignore[import-not-found]

    monkeypatch.setattr(packed.int8_networks, "lifted", lambda name, cache: lifted[0])
    pixels = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        part = "train" if number < 3 else "validation"
        place = tmp_path / "cifar10" / part / packed.fetch.CLASSES[2 * number] / f"{number}.png"
        place.parent.mkdir(parents=True)
        Image.fromarray(image).save(place)
    packed.pack(tmp_path / "pack", tmp_path, ["clip"], (3, 2), 1000)
    return tmp_path / "pack", pixels


def test_what_is_packed_is_read_as_it_was(pack, lifted):
    import packed  # type: ignore[import-not-found]

    folder, pixels = pack
    sizes = [
        sum(path.stat().st_size for path in piece.glob("*.*") if path.suffix != ".json") for piece in folder.iterdir()
    ]
    assert max(sizes) <= 1000
    assert len(sizes) > 2
    found = packed.images(folder)
    np.testing.assert_array_equal(np.concatenate([found["train"][0], found["validation"][0]]), pixels)
    assert [found[part][1].tolist() for part in packed.PARTS] == [[0, 2, 4], [6, 8]]
    np.testing.assert_allclose(packed.network(folder, "clip")["visual_projection.weight"], lifted[1][1], rtol=1e-6)


def test_a_piece_that_is_missing_costs_its_rows_alone(pack, tmp_path):
    import pretrained  # type: ignore[import-not-found]

    folder, _ = pack
    for chunk in folder.glob("*/clip.*"):
        chunk.unlink()
    words = ["measure", str(folder), "--out", str(tmp_path / "out"), "--rows", "clip:0.7", "--calibration-images", "2"]
    options = pretrained.parser().parse_args(words)
    options.run(options)
    rows = json.loads((tmp_path / "out" / "pretrained.json").read_text())["rows"]
    assert rows["clip:0.7"]["failure"].startswith("MissingError: clip: 0 of ")
    assert "| clip:0.7 | MissingError: clip: 0 of" in (tmp_path / "out" / "pretrained.md").read_text()


def test_a_row_of_another_protocol_is_measured_again(tmp_path):
    from pretrained import Protocol, once  # type: ignore[import-not-found]

    first, second = (Protocol(8, 4, 0, 10, 10, 2, seed) for seed in (0, 1))
    made = [once(tmp_path / "row.json", protocol, lambda: {"figure": 1}) for protocol in (first, second)]
    assert [row["protocol"]["seed"] for row in made] == [0, 1]
    kept = once(tmp_path / "row.json", second, lambda: pytest.fail("it is there"))
    assert kept == made[1]


@pytest.fixture
def embedded():
    """Embeddings of three classes that overlap, 30 to look among and 20 to look at, around a common mean."""
    from embedded import Embedded  # type: ignore[import-not-found]

    draw = torch.Generator().manual_seed(3)
    centres, classes = torch.randn(3, 8, generator=draw), torch.arange(50) % 3
    points = 3 + centres[classes] + 1.2 * torch.randn(50, 8, generator=draw)
    return Embedded(points[:30], classes[:30], points[30:], classes[30:])


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_classes_are_those_of_a_search_by_hand(embedded):
    import embedded as module  # type: ignore[import-not-found]

    units = embedded.among / embedded.among.norm(dim=1, keepdim=True)
    means = [units[embedded.classes == number].mean(0) for number in range(3)]
    by_mean = [max(range(3), key=lambda c, x=x: cosine(x, means[c])) for x in embedded.images]
    assert module.class_mean(embedded).tolist() == by_mean
    for image, found in zip(embedded.images, module.neighbours(embedded), strict=True):
        near = sorted(range(30), key=lambda m, x=image: -cosine(x, embedded.among[m]))[: module.NEIGHBOURS]
        votes = [sum(int(embedded.classes[m]) == c for m in near) for c in range(3)]
        assert votes[int(found)] == max(votes)


def test_a_probe_knows_no_units_and_fits_better_than_means(embedded):
    import embedded as module  # type: ignore[import-not-found]

    scaled = SimpleNamespace(**vars(embedded))
    scaled.among, scaled.images = (100 * value - 7 for value in (embedded.among, embedded.images))
    assert torch.equal(module.probe(embedded), module.probe(scaled))  # type: ignore[arg-type]
    seen = SimpleNamespace(**vars(embedded))
    seen.images, seen.truth = embedded.among, embedded.classes
    right = {name: float(hits.double().mean()) for name, hits in module.answers(seen).items()}  # type: ignore[arg-type]
    assert right["probe"] >= right["class mean"]
    assert right["probe"] > 0.9


def test_nearness_and_pairs_by_hand(embedded):
    from embedded import nearness, paired  # type: ignore[import-not-found]

    own, wanted, centre = embedded.images + 0.1 * embedded.images.flip(0), embedded.images, embedded.among.mean(0)
    found = nearness(own, wanted, centre)
    a, b = (value.double().numpy() for value in (own - centre, wanted - centre))
    assert found["centred cosine"] == pytest.approx(
        np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]), rel=1e-5
    )
    assert found["centred distance"] == pytest.approx(np.mean(((a - b) ** 2).sum(1) / (b**2).sum(1)), rel=1e-5)
    assert found["distance"] < found["centred distance"]
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    told = paired(*hits)
    assert told["dense"] == told["pruned"] == 75
    assert told["difference"] == 0
    assert told["error"] == pytest.approx(np.std([0, 100, -100, 0], ddof=1) / 2)
