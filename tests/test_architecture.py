"""The house rules that no linter knows: imports point down, nothing heavy loads early, files and rooms stay small."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
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
    {"measure"},
    {"families"},
    {"config"},
    {"spelling"},
    {"plan"},
    {"processes"},
    {"atomic"},
    {"events"},
    {"errors", "printable", "version"},
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
HEAVY = {"torch", "torchvision", "timm", "onnx", "onnxruntime", "accelerate", "numpy", "safetensors"}
POSIX = {"fcntl", "grp", "pwd", "resource", "termios"}
LONGEST_FILE = 350  # lines
LONGEST_FUNCTION = 60  # lines: what fits on a screen
LARGEST_ROOM = 0.2  # of the package's lines


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path): path for path in MODULES}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def loaded_at_once(body: Iterable[ast.AST]) -> Iterator[str]:
    """The modules that are imported with this code, and not only when a function of it is called."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names) if isinstance(node, ast.Import) else [str(node.module)]
        elif not isinstance(node, ast.FunctionDef):
            yield from loaded_at_once(ast.iter_child_nodes(node))


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of kcrprune that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in NAMES else node.module for name in inner)


def violations(unit: str, tree: ast.Module) -> list[str]:
    others = {unit_of(NAMES[name]) for name in imported(tree)} - {unit}
    return [other for other in others if RANK[other] <= RANK[unit]]


def texts() -> Iterator[tuple[str, str]]:
    """The name and the content of every text of the repository but this one."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    for path in files:
        if path.is_file() and path.suffix in WRITTEN and path != Path(__file__).resolve():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_imports_point_down():
    found = {str(path): violations(unit_of(path), parsed(path)) for path in MODULES}
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
    assert violations(unit, ast.parse(source))


def test_no_imports_go_in_a_circle():
    TopologicalSorter({name: set(imported(parsed(path))) for name, path in NAMES.items()}).prepare()


def test_every_unit_has_its_layer():
    assert {unit_of(path) for path in MODULES} == RANK.keys()


def test_the_package_and_its_command_line_load_nothing_heavy():
    code = "import sys, kcrprune.cli.app, kcrprune.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "kcrprune.config" in loaded.split()
    assert not HEAVY & set(loaded.split())


def test_what_one_system_alone_has_is_imported_where_it_is_used():
    found = {str(path): POSIX & set(loaded_at_once(parsed(path).body)) for path in MODULES}
    assert not {name: modules for name, modules in found.items() if modules}
    assert list(loaded_at_once(ast.parse("if True:\n import resource\ndef late():\n import fcntl").body)) == [
        "resource"
    ]


def test_files_and_functions_stay_small():
    long = [str(path) for path in MODULES if path.read_text(encoding="utf-8").count("\n") > LONGEST_FILE]
    long += [
        f"{path}:{node.name}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_every_text_is_read_and_written_as_utf_8():
    for path in MODULES:
        for call in (node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)):
            text = (
                getattr(call.func, "attr", "") in ("read_text", "write_text") or getattr(call.func, "id", "") == "open"
            )
            assert not text or "utf-8" in ast.unparse(call), f"{path.name}: {ast.unparse(call)}"


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
