"""Random command lines by the thousand, on tiny files: each ends with a documented exit code and leaves nothing behind.

`python -m tests.cli.fuzz --count 2000 --seed 0` runs them; the suite runs a small part, in one process. What takes long
is stopped by a signal, which is an end that is looked at as well. A case depends on its number and the seed alone:
`--first 4711 --count 1` repeats one and shows what it wrote.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import onnx
import onnxscript  # noqa: F401 (stopped while it is imported, it would stay half of itself in this process)
import torch
from PIL import Image
from typer.main import get_command

from kcrprune.artifact.artifact import save_model
from kcrprune.cli import signals
from kcrprune.cli.app import app, run
from kcrprune.config import RunConfig
from kcrprune.errors import KcrPruneError
from kcrprune.plan import Preprocessing
from kcrprune.run.folder import ASKED, STORE
from tests.graphs.graphs import classifier
from tests.tiny import TINY

SECONDS = 1.5  # of processor time; after that a case is stopped
STOPPED = 143  # by SIGTERM
MEMORY = 2**31  # bytes beyond what the process takes at the start
CODES = {0, 1, STOPPED} | {kind.exit_code for kind in KcrPruneError.__subclasses__()}
COMMANDS = ("compress", "compress", "report", "export", "evaluate", "inspect", "inspect", "demo")
QUICK = [
    *["--generated-images", "24", "--calibration-images", "8", "--score-images", "8", "--batch-size", "4"],
    *["--recover-steps", "1", "--workers", "0", "--device", "cpu"],
]
PATHS = (
    *(
        "dense.safetensors",
        "dense.safetensors",
        "vit.pth",
        "run",
        "run/model.safetensors",
        "m.onnx",
        "page.onnx",
        "page.pth",
        "short.safetensors",
    ),
    *("photos", "flat", "empty", "good.toml", "bad.toml", "map.txt", "missing.pth", "link", "loop", "deep/out", "new"),
    *(
        "",
        ".",
        "..",
        "/dev/null",
        "/proc/self/mem",
        "n" * 300,
        "a\0b",
        "\u202e\u2603.pth",
        "a\nb",
        os.fsdecode(b"\xff\xfe"),
    ),
)
NUMBERS = (
    *(
        "0",
        "1",
        "2",
        "3",
        "7",
        "8",
        "32",
        "-1",
        "-0",
        "0.5",
        "0.7",
        "1.0000001",
        "1e-320",
        "1e308",
        "1e309",
        "nan",
        "inf",
    ),
    *(
        "-inf",
        "4294967296",
        "9223372036854775808",
        "18446744073709551616",
        "1" + "0" * 400,
        "1_000",
        "0x10",
        "\u0663",
        "½",
    ),
    *("", " ", "ten", "70%", "4.2G", "--", "1,2", "\0"),
)
WORDS = (
    *("auto", "cpu", "cuda", "cuda:99", "cuda:-1", "mps", "default", "paper", "no-train", "bicubic", "random", "evil"),
    *(
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "resnet50",
        "train",
        "validation",
        "torch/cifar10",
        "hfds/",
    ),
    *("", " ", "\0", "é", "../x", "a/b", "nan", "-1", "mlp_hidden", "heads", "*", "[", "blocks.0", "\ud800"),
)
LISTS = (
    "",
    ",",
    "mlp_hidden",
    "heads,heads",
    "mlp_hidden,attn_value",
    "0,0,0",
    "nan,nan,nan",
    "0.5,0.5,0.5",
    "1,2",
    "inf",
)


@dataclass(frozen=True)
class Outcome:
    """How a command line ended, and what is wrong with that; None: nothing."""

    case: int
    words: list[str]
    code: int
    seconds: float
    fault: str | None
    told: str


def world(folder: Path) -> None:
    """Tiny files of all kinds: networks, a finished run, images, settings, and what only looks like them."""
    tiny = TINY[0]
    preprocessing = Preprocessing(input_size=tiny.input_size, mean=(0.5,) * 3, std=(0.5,) * 3)
    named = {"architecture": tiny.architecture, "preprocessing": preprocessing, "class_names": None, "record": {}}
    save_model(folder / "dense.safetensors", tiny.model(), plan=None, **named)
    torch.save(tiny.model().state_dict(), folder / "vit.pth")
    onnx.save(classifier(("N", 3, 32, 32)), folder / "m.onnx")
    for name in ("page.pth", "page.onnx"):
        (folder / name).write_text("<!DOCTYPE html><html></html>")
    (folder / "short.safetensors").write_bytes((folder / "dense.safetensors").read_bytes()[:-100])
    for part in ("photos/train", "photos/validation", "flat"):
        for number in range(10):
            path = folder / part / ("" if part == "flat" else f"class{number % 5}") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (25 * number, 50, 0)).save(path)
    (folder / "empty").mkdir()
    (folder / "good.toml").write_text("target_flops = 0.8\nseed = 3\n")
    (folder / "bad.toml").write_text("target_flops = [\n")
    (folder / "map.txt").write_text("".join(f"class{number}\n" for number in range(5)))
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert run(["compress", "dense.safetensors", "--out", "run", "-q", *QUICK]) == 0


def command_line(draw: random.Random) -> list[str]:
    """Words that are nearly right, or not at all."""
    command = draw.choice(COMMANDS)
    options: list[Any] = [p for p in get_command(app).commands[command].params if p.param_type_name == "option"]  # type: ignore[attr-defined]
    words = [] if command == "demo" and draw.random() < 0.1 else ["--out", "run"] if command == "demo" else []
    words += [draw.choice(PATHS[:2]) if draw.random() < 0.5 else draw.choice(PATHS)] if command != "demo" else []
    words += QUICK if command == "compress" else ["--data", "photos", "--workers", "0"] if command == "evaluate" else []
    for option in draw.choices(options, k=draw.choice((0, 1, 1, 2, 3))):
        words += _used(draw, option)
    if draw.random() < 0.1:
        words.insert(draw.randrange(len(words) + 1), draw.choice(("--nonsense", "-x", "--", "", *PATHS)))
    if command == "compress" and draw.random() < 0.8:
        words += ["--out", draw.choice(("new", "deep/new", "empty"))]
    return [command, *words]


def _used(draw: random.Random, option: Any) -> list[str]:
    name = draw.choice([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return [name]
    value = draw.choice(_pool(option))
    return [f"{name}={value}"] if name.startswith("--") and draw.random() < 0.3 else [name, value]


def _pool(option: Any) -> tuple[str, ...]:
    """Values that an option may be given: mostly of its type."""
    if option.name not in RunConfig.model_fields:
        return ("table", "json", "markdown", "html") if option.name == "form" else PATHS
    kind = RunConfig.model_fields[option.name].annotation
    if get_origin(kind) is Literal:
        return (*get_args(kind), "nonsense")
    if option.name in ("data", "class_map"):
        return PATHS
    return LISTS if "tuple" in str(kind) else WORDS if "str" in str(kind) else NUMBERS


def tree(folder: Path) -> dict[Path, tuple[int, int]]:
    """Everything below a folder, with its size and time."""
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {path: (state.st_size if path.is_file() else 0, path.is_file() * state.st_mtime_ns) for path, state in found}


def run_case(case: int, seed: int, folder: Path, patience: float = SECONDS) -> Outcome:
    """Runs one command line in a folder, and puts that back."""
    words, before = command_line(random.Random(f"{seed}:{case}")), tree(folder)
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", "strict"),
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"),
    )
    started = time.monotonic()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _run(words, patience)
    seconds = time.monotonic() - started
    printed, told = (stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush())  # type: ignore[attr-defined]
    after = tree(folder)
    fault = _wrong(words, code, printed, told) or _left(code, before, after)
    for path in sorted(after.keys() - before.keys(), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return Outcome(case, words, code, seconds, fault, told)


def _run(words: list[str], patience: float) -> int:
    """The exit code, -1 where anything came out; what takes long is stopped by a signal."""
    rings = [False]  # until it has rung

    def ring(*_: object) -> None:
        if rings:
            rings[0] = True
            signal.raise_signal(signal.SIGTERM)  # a shell has its background ignore SIGINT

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, patience)
    try:
        with signals.heeded():
            code = run(words)
            rings.clear()
    except BaseException as error:  # noqa: BLE001, RUF100  # nothing may come out
        stopped = rings == [True] and isinstance(error, KeyboardInterrupt)  # as it ended; the program catches that
        rings.clear()
        code = STOPPED if stopped else -1
        sys.stderr.write("" if stopped else f"{type(error).__name__} came out: {error}")
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    return code


def _wrong(words: list[str], code: int, printed: str, told: str) -> str | None:
    """What is wrong with the exit code and what was printed."""
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if code not in CODES:
        return f"exit code {code}"
    if "Traceback" in told or "error: unexpected" in told:
        return "not foreseen"
    if code not in (0, STOPPED) and (len(errors) != 1 or not told.endswith(f"{errors[0]}\n") or printed):
        return "not one sentence"
    if code == 0 and "--json" in words and "--help" not in words:
        try:
            json.loads(printed)
        except ValueError:
            return "no pure JSON"
    return None


def _left(code: int, before: dict[Path, Any], after: dict[Path, Any]) -> str | None:
    """What is wrong with the files: one of the user's changed, a temporary one is left, or a refusal left any."""
    if changed := [path.name for path, state in before.items() if after.get(path) != state]:
        return f"changed {changed}"
    new = after.keys() - before.keys()
    if [
        path
        for path in new
        if path.name.endswith(".part") or (path.parent.name == STORE and path.name.startswith("lock"))
    ]:
        return "a temporary file is left"
    runs = {path.parent.parent for path in new if path.name == ASKED}
    strays = [path for path in new if not any(path.is_relative_to(run) or run.is_relative_to(path) for run in runs)]
    return f"left {[path.name for path in strays]}" if code != 0 and strays else None


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Inside, memory is limited."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def outcomes(cases: range, seed: int, seconds: float = SECONDS) -> Iterator[Outcome]:
    """Every case in turn, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        world(Path(folder))
        with bounded():
            for case in cases:
                yield run_case(case, seed, Path(folder), seconds)


def _work(cases: range, seed: int, seconds: float) -> None:
    """Prints outcomes as JSON, up to a bad one that what was stopped before it may have brought about."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stopped = False
    for outcome in outcomes(cases, seed, seconds):
        if stopped and outcome.fault is not None:
            return
        stopped = stopped or outcome.code == STOPPED
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()


def supervised(cases: range, seed: int, seconds: float = SECONDS) -> Iterator[Outcome]:
    """All outcomes: libraries that were stopped half way are not themselves, so a bad case counts in a new process.

    So does a death: C++ that calls Python back aborts where a signal has that raise.
    """
    following, died = cases.start, -1
    while following < cases.stop:
        command = [sys.executable, "-W", "ignore", "-m", "tests.cli.fuzz", "--worker", "--first", str(following)]
        command += ["--count", str(cases.stop - following), "--seed", str(seed), "--seconds", str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                yield Outcome(**json.loads(line))
                following += 1
        if worker.returncode != 0 and died == following:
            yield Outcome(following, [], worker.returncode, 0.0, "the process died, twice", "")
            following += 1
        elif worker.returncode != 0:
            died = following
            sys.stderr.write(f"case {died}: exit {worker.returncode}, tried once more\n")


def main() -> int:
    """Runs the cases, prints a summary, and returns 1 where one ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("count", 2000), ("seed", 0), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of processor time for a command line")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = range(options.first, options.first + options.count)
    if options.worker:
        _work(cases, options.seed, options.seconds)
        return 0
    started, found = time.monotonic(), list[Outcome]()
    for outcome in supervised(cases, options.seed, options.seconds):
        found.append(outcome)
        if outcome.fault is not None or options.count == 1:
            line = f"case {outcome.case}: {outcome.fault}, exit {outcome.code}: {shlex.join(outcome.words)!r}\n"
            line += f"  {outcome.told[-400:]!r}\n"
            sys.stdout.write(line.encode("utf-8", "backslashreplace").decode())
            sys.stdout.flush()
    bad = sum(outcome.fault is not None for outcome in found)
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(Counter(each.code for each in found).items()))
    took = time.monotonic() - started
    sys.stdout.write(f"{len(found)} command lines in {took:.0f} s, by exit code {codes}; {bad} bad\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
