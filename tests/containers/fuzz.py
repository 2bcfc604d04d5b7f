"""Damaged and hostile files by the thousand: each ends in an error of ours or in a network that computes.

`python -m tests.containers.fuzz --count 20000 --seed 0` runs them in a worker process with 1 GB of memory beyond what
the libraries take, 2 s of processor time a file, and a witness file that exists only if code of a file ran. A case
depends on its number and the seed alone: `--first 4711 --count 1` repeats one.
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kcrprune.artifact.artifact import open_model
from kcrprune.errors import KcrPruneError
from kcrprune.graphs import open_onnx
from tests.containers.corpus import Sample, honest, hostile
from tests.containers.mutation import mutate

SECONDS = 2.0  # processor time of one file
MEMORY = 2**30  # bytes beyond what the process takes after its imports


@dataclass(frozen=True)
class Outcome:
    """How one case ended."""

    case: int
    name: str
    kind: str  # opened, or the class of the error
    text: str
    seconds: float
    is_ours: bool  # an error of kcrprune, or a network that computes


class TooSlow(BaseException):
    """Raised by the processor-time alarm; not an Exception, so that nobody handles it by accident."""


def run_case(case: int, seed: int, corpus: list[Sample], folder: Path, *, untouched: int) -> Outcome:
    """Writes one file, damaged unless it is one of the first `untouched`, and opens it."""
    draw = random.Random(f"{seed}:{case}")
    sample = corpus[case] if case < untouched else draw.choice(corpus)
    data = sample.data if case < untouched else mutate(draw, sample.data, [other.data for other in corpus])
    for file in folder.iterdir():
        file.unlink()
    for name, content in {**sample.beside, sample.name: data}.items():
        (folder / name).write_bytes(content)
    named = folder if sample.name == "config.json" else folder / sample.name
    started = time.process_time()
    kind, text, is_ours = _open(named)
    return Outcome(case, sample.name, kind, text, time.process_time() - started, is_ours)


def _open(path: Path) -> tuple[str, str, bool]:
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        _compute(path)
    except KcrPruneError as error:
        return type(error).__name__, str(error), "\n" not in str(error) and len(str(error)) < 1000
    except (Exception, TooSlow) as error:  # noqa: BLE001, RUF100  # whatever else comes out is what is looked for
        return type(error).__name__, f"{error}"[:500], False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "opened", "", True


@torch.no_grad()
def _compute(path: Path) -> None:
    """Opens a file and feeds it an image; heads and sizes that a file hides are given."""
    if path.suffix == ".onnx":
        graph = open_onnx(path)
        graph(torch.zeros(1, *graph.input_size))
        return
    opened = open_model(path, num_heads=2) if path.suffix in (".pth", ".pkl") else open_model(path)
    opened.model(torch.zeros(1, *opened.preprocessing.input_size))


def too_slow(*_: object) -> None:
    """The alarm's handler."""
    raise TooSlow


def outcomes(cases: range, seed: int) -> Iterator[Outcome]:
    """Every case in turn, in this process."""
    signal.signal(signal.SIGPROF, too_slow)
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as opened:
        witness = Path(made) / "code-ran"
        good, bad = honest(Path(made)), hostile(witness)
        corpus = [*good, *bad, *good, *good, *good]  # damage to honest files reaches further
        for case in cases:
            outcome = run_case(case, seed, corpus, Path(opened), untouched=len(good) + len(bad))
            if witness.exists():
                witness.unlink()
                outcome = Outcome(**(asdict(outcome) | {"kind": "CODE RAN", "is_ours": False}))
            yield outcome


def _work(cases: range, seed: int) -> None:
    """Runs cases in this process and prints each outcome; the parent takes up where a crash left off."""
    torch.set_num_threads(1)
    next(outcomes(range(1), seed))  # loads everything that opening needs, before memory is limited
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for outcome in outcomes(cases, seed):
        sys.stdout.write(json.dumps(asdict(outcome)) + "\n")
        sys.stdout.flush()


def _supervise(cases: range, seed: int) -> list[Outcome]:
    """All outcomes; a worker that dies is an outcome, too."""
    found: list[Outcome] = []
    following = cases.start
    while following < cases.stop:
        command = [sys.executable, "-m", "tests.containers.fuzz", "--worker", "--first", str(following)]
        command += ["--count", str(cases.stop - following), "--seed", str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                found.append(Outcome(**json.loads(line)))
                following = found[-1].case + 1
        if following < cases.stop:
            found.append(Outcome(following, "?", f"worker died ({worker.returncode})", "", 0.0, is_ours=False))
            following += 1
    return found


def main() -> int:
    """Runs the cases, prints a summary, and returns 1 where one ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = range(options.first, options.first + options.count)
    if options.worker:
        _work(cases, options.seed)
        return 0
    started = time.monotonic()
    found = _supervise(cases, options.seed)
    bad = [outcome for outcome in found if not outcome.is_ours]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(outcome.kind for outcome in found).most_common())
    slowest = max(found, key=lambda outcome: outcome.seconds)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    sys.stdout.write(
        f"{len(found)} files in {time.monotonic() - started:.0f} s: {kinds}\n"
        f"slowest {slowest.seconds:.2f} s (case {slowest.case}, {slowest.name}), largest process {memory:.0f} MB\n"
        f"{len(bad)} ended badly\n"
    )
    for outcome in bad[:50]:
        sys.stdout.write(f"  case {outcome.case} {outcome.name}: {outcome.kind}: {outcome.text}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
