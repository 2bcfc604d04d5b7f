"""kcrprune against its peers, at equal MACs, equal training steps and equal distillation.

    python docs/benchmarks/peers.py --cache CACHE --vit VIT.safetensors --out RESULTS

Every network is cut to every target by every method. The rest is one protocol: MACs by one counter, accuracy on the
first test images, then recovery by kcrprune's own code (labels and distillation from the dense network, no kernel
term) for the same steps on the same batches with each of a few rates, of which the one with the lowest held-out loss
is kept, accuracy again, and the time of one image in ONNX Runtime. The table is RESULTS/peers.md, the figures
RESULTS/peers.json; both are written again after each row. A row is a process of its own, so that its memory is its
own, and lies below RESULTS/rows; what lies there is not measured again, so a run that was ended goes on where it was.
A method that fails keeps its row, with the reason; --retry measures such rows again.

The peers are no dependencies of kcrprune, and a method without its peer has a row that says so:

    pip install torch-pruning==1.6.1 nvidia-modelopt==0.47.* torchprofile==0.0.4 requests
"""

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fetch
from common import WEIGHTS, first_images, machine_facts
from peer_table import DENSE, Protocol, Row, ordered, row_from, to_markdown

from kcrprune.atomic import write_atomically

METHODS = (
    "kcrprune-no-train", "kcrprune-search", "magnitude", "random", "tp-uniform-l2", "tp-bottleneck-l2",
    "tp-bottleneck-taylor", "tp-isomorphic-taylor", "modelopt-fastnas", "scratch", "vbp", "grail", "corp", "tome",
)  # fmt: skip
NETWORKS = ("vit", "deit", "swin", "tiny_vit")
LIBRARIES = ("torch-pruning", "nvidia-modelopt")
FIT_TEST_IMAGES = 100  # test images that a method's own run may measure itself on; they decide nothing
EXPLAINED = {
    "recovery": "one training at the kept rate; the dense network's logits were at hand",
    "pruning": "everything before recovery, the search of a ratio included; kcrprune-search trains its gates for 60 "
    "steps on frozen weights, kcrprune-no-train (the default before its recovery) trains nothing",
    "passes": "the time of pruning in passes of the dense network over the 1,024 calibration images",
    "to dense": "paired difference on the same test images, in points, and its standard error",
    "memory": "largest resident memory of the row's process",
}
STOPS = (1, -signal.SIGINT, -signal.SIGTERM)  # an error of this script, told already, or somebody's wish
log = logging.getLogger("peers")


def once(path: Path, measure: Callable[[], Row], *, retry: bool = False) -> Row:
    """The row in `path`, measured if it is not there, or if it failed and may be tried again."""
    if path.exists():
        row = row_from(json.loads(path.read_text()))
        if not (retry and row.failure):
            return row
    row = measure()
    write_json(path, asdict(row))
    return row


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is whole or absent."""
    text = json.dumps(content, indent=1)
    write_atomically(path, lambda temporary: temporary.write_text(text), replace=True)


def same_protocol(path: Path, protocol: Protocol) -> None:
    """Keeps the protocol of the rows in `path`; ends the program where the rows there are of another one."""
    wanted = json.loads(json.dumps(asdict(protocol)))
    if path.exists() and (found := json.loads(path.read_text())) != wanted:
        names = ", ".join(name for name, value in wanted.items() if found.get(name) != value)
        sys.exit(f"{path.parent} holds rows that were measured with another {names}; name another --out")
    write_json(path, wanted)


def in_own_process(row: Row, words: Sequence[str], threads: int, path: Path) -> Row:
    """Has a process of its own write `row` to `path`; the row with the reason where the process died."""
    path.unlink(missing_ok=True)
    one = ["--row", row.network, f"{row.target:g}", row.method, str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *words, *one], check=False, env=environment)
    if done.returncode == 0:
        found = row_from(json.loads(path.read_text()))
        path.unlink()
        return found
    if done.returncode in STOPS:
        sys.exit(f"{row.network}, {row.target:g}, {row.method}: ended with an error")
    return Row(row.network, row.target, row.method, failure=f"the process ended with code {done.returncode}")


def measure(arguments: argparse.Namespace, protocol: Protocol) -> None:
    """Measures the one row that --row names; the process that started this one waits for its file."""
    from peer_row import Bench

    network, target, method, path = arguments.row
    data, out = fetch.cifar10(arguments.cache).resolve(), arguments.out.resolve()
    images = [first_images(data, out / "images", count) for count in (protocol.test_images, FIT_TEST_IMAGES)]
    bench = Bench.open(checkpoint_of(network, arguments), *images, protocol, out / network)
    write_json(Path(path), asdict(bench.row(network, float(target), method)))


def checkpoint_of(network: str, arguments: argparse.Namespace) -> Path:
    """The dense network; ends the program where it is missing."""
    vit = arguments.vit or arguments.cache / "vit_cifar10.safetensors"
    path = (vit if network == "vit" else WEIGHTS / f"{network}_cifar10.safetensors").resolve()
    if not path.exists():
        sys.exit(f"{path} is not there; name another --vit, or take the networks from a whole clone")
    return path


def compare(arguments: argparse.Namespace, protocol: Protocol, words: Sequence[str]) -> None:
    """All rows, one after the other; the table after each."""
    out: Path = arguments.out
    same_protocol(out / "protocol.json", protocol)
    goals = [(target, method) for target in arguments.targets for method in arguments.methods]
    rows: list[Row] = []
    for network in arguments.networks:
        for target, method in [(1.0, DENSE), *goals]:
            path = out / "rows" / network / f"{method}-{target:g}.json"
            wanted, part = Row(network, target, method), path.with_suffix(".part")

            def measured(wanted: Row = wanted, part: Path = part) -> Row:
                log.info("%s at %g by %s", wanted.network, wanted.target, wanted.method)
                return in_own_process(wanted, words, protocol.threads, part)

            rows.append(once(path, measured, retry=arguments.retry))
            if method == DENSE and rows[-1].failure:
                sys.exit(f"the dense network {network} cannot be measured: {rows[-1].failure}")
            write_results(out, ordered(rows, arguments.networks, (DENSE, *arguments.methods)), protocol)
    log.info("%s", (out / "peers.md").read_text())


def write_results(out: Path, rows: Sequence[Row], protocol: Protocol) -> None:
    """The table and the figures of the rows so far."""
    facts = (
        machine_facts(LIBRARIES)
        | {name: _told(value) for name, value in asdict(protocol).items()}
        | {f'"{name}"': text for name, text in EXPLAINED.items()}
        | {"command": "python docs/benchmarks/peers.py --cache CACHE --vit VIT --out RESULTS"}
    )
    text = to_markdown(rows, facts)
    write_atomically(out / "peers.md", lambda path: path.write_text(text), replace=True)
    write_json(out / "peers.json", {"rows": [asdict(row) for row in rows], "circumstances": facts})


def _told(value: Any) -> str:
    return ", ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--cache", type=Path, required=True, help="folder for what is fetched")
    found.add_argument("--vit", type=Path, help="ViT fine-tuned on CIFAR-10; default CACHE/vit_cifar10.safetensors")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    found.add_argument("--targets", nargs="+", type=float, default=(0.7, 0.5, 0.35))
    found.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    found.add_argument("--seed", type=int, default=42)
    found.add_argument("--steps", type=int, default=60, help="of recovery; 0: the cut networks alone, without time")
    found.add_argument("--batch-size", type=int, default=32)
    found.add_argument("--rates", nargs="+", type=float, default=(2e-5, 2e-4), help="of recovery, each tried")
    found.add_argument("--scratch-rates", nargs="+", type=float, default=(3e-4, 1e-3), help="the same for scratch")
    found.add_argument("--test-images", type=int, default=2000)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--retry", action="store_true", help="measure rows again that failed")
    found.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    return found


def main() -> None:
    """Makes the table, or one row of it."""
    words = sys.argv[1:]
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    protocol = Protocol(
        seed=arguments.seed,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        rates=tuple(arguments.rates),
        scratch_rates=tuple(arguments.scratch_rates),
        test_images=arguments.test_images,
        threads=arguments.threads,
    )
    if arguments.row:
        measure(arguments, protocol)
        return
    log.info("%s", shlex.join(["peers.py", *words]))
    for network in arguments.networks:
        checkpoint_of(network, arguments)
    fetch.cifar10(arguments.cache)
    compare(arguments, protocol, words)


if __name__ == "__main__":
    main()
