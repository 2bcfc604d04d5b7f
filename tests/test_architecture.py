"""The house rules that no linter knows: imports point down, nothing heavy loads early, files and rooms stay small."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kcrprune"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("kcrprune", "tests", "docs", ".github", ".ci")
WRITTEN = {".py", ".md", ".toml", ".yml", ".json", ""}  # suffixes of text; .ci/run has none

LAYERS = (  # from high to low; a unit imports itself or a lower layer
    {"__main__"},
    {"__init__", "cli"},
    {"pipeline"},
    {"run"},
    {"training", "artifact", "graphs"},
    {"checkpoints"},
    {"containers"},
    {"surgery"},
    {"method"},
    {"families", "measure"},
    {"config"},
    {"spelling"},
    {"plan"},
    {"processes"},
    {"atomic"},
    {"events"},
    {"errors", "printable", "version"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
HEAVY = {"torch", "torchvision", "timm", "fvcore", "onnx", "onnxruntime", "accelerate", "numpy", "safetensors"}
LONGEST_FILE = 350  # lines
LONGEST_FUNCTION = 60  # lines: what fits on a screen
LARGEST_ROOM = 0.2  # of the package's lines


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


def imported(source: str) -> Iterator[str]:
    """The modules of kcrprune that a module's source imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in NAMES else node.module for name in inner)


def violations(unit: str, source: str) -> list[str]:
    others = {unit_of(NAMES[name]) for name in imported(source)} - {unit}
    return [other for other in others if RANK[other] <= RANK[unit]]


def texts() -> Iterator[tuple[str, str]]:
    """The name and the content of every text of the repository but this one."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix in WRITTEN and path != Path(__file__).resolve():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_imports_point_down():
    found = {str(path): violations(unit_of(path), path.read_text(encoding="utf-8")) for path in MODULES}
    assert not {name: units for name, units in found.items() if units}


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("training", "from kcrprune.artifact.artifact import open_model"),
        ("method", "def late():\n    import kcrprune.pipeline.compress"),
        ("graphs", "import kcrprune.artifact.artifact"),
        ("plan", "from kcrprune import config"),
        ("cli", "from kcrprune import __version__"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(unit, source):
    assert violations(unit, source)


def test_no_imports_go_in_a_circle():
    TopologicalSorter({name: set(imported(path.read_text(encoding="utf-8"))) for name, path in NAMES.items()}).prepare()


def test_every_unit_has_its_layer():
    assert {unit_of(path) for path in MODULES} == RANK.keys()


def test_the_package_and_its_command_line_load_nothing_heavy():
    code = "import sys, kcrprune.cli.app, kcrprune.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "kcrprune.config" in loaded.split()
    assert not HEAVY & set(loaded.split())


def test_every_module_loads_on_windows_which_has_no_resource():
    # psutil, which needs it on this system and not on that one, is there before
    code = f"import sys, psutil; sys.modules['resource'] = None; import {', '.join(sorted(NAMES))}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT)


def test_files_and_functions_stay_small():
    sources = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in MODULES}
    long = [name for name, source in sources.items() if source.count("\n") > LONGEST_FILE]
    long += [
        f"{name}:{node.name}"
        for name, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_every_text_is_read_and_written_as_utf_8():
    for path in MODULES:
        for call in (
            node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ):
            name, words = ast.unparse(call.func), ast.unparse(call)
            assert not name.endswith((".read_text", ".write_text")) or "utf-8" in words, f"{path.name}: {words}"
            assert name != "open" or "utf-8" in words, f"{path.name}: {words}"


def test_no_room_holds_everything():
    lines = Counter[str]()
    for path in MODULES:
        lines[unit_of(path)] += path.read_text(encoding="utf-8").count("\n")
    [(room, most)] = lines.most_common(1)
    assert most <= LARGEST_ROOM * lines.total(), f"{room} has {most} of {lines.total()} lines"


def test_names_say_what_is_inside():
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in MODULES}


def test_no_text_names_one_machine_or_leaves_work_undone():
    machine = re.compile(r"(?<![\w.])/(work|root|home/\w+)/\w")
    undone = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert not [name for name, text in texts() if machine.search(text) or undone.search(text)]
