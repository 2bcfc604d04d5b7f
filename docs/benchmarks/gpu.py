"""What one GPU shows in nine minutes: the parts of gpu_parts.py in order of worth, each in a process of its own.

    python docs/benchmarks/gpu.py --out FOLDER [--parts machine,same] [--small] [--data IMAGES] [--steps N]

A part that fails or takes too long costs only itself; FOLDER/gpu.json is written anew after each. Nothing is fetched:
weights are those of this folder or random, images are generated. `search` and `ort` run where they are named. Without
a GPU, `--small` tries every part on the CPU, on tiny networks.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

LIMITS: Final = {
    "machine": 30,
    "same": 100,
    "kernels": 40,
    "big": 180,
    "latency": 60,
    "steps": 100,
    "laws": 60,
}  # seconds
NAMED: Final = {"ort": 150, "search": 3600}  # only where they are asked for
TOTAL: Final = 530  # of the parts that are not named
SLOW: Final = 8  # times as long on a CPU
PARTS: Final = Path(__file__).with_name("gpu_parts.py")


def measure(parts: Sequence[str], out: Path, command: Sequence[str], slow: float = 1) -> dict[str, Any]:
    """Every part's findings, with its seconds and how it failed, if it did; the part's name goes behind `command`."""
    found, began = dict[str, Any](), time.monotonic()
    for name in parts:
        start, log, file = time.monotonic(), out / f"{name}.log", out / f"{name}.json"
        file.unlink(missing_ok=True)  # of an earlier try
        left = slow * TOTAL - (start - began)
        limit = slow * NAMED[name] if name in NAMED else min(slow * LIMITS[name], left)
        with log.open("w", encoding="utf-8") as told:
            part = subprocess.Popen([*command, name], stdout=told, stderr=told, start_new_session=True)
            error = ended(part, limit)
        found[name] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        found[name] |= {"seconds": round(time.monotonic() - start, 1)}
        if error:
            found[name] |= {"error": error, "log": log.read_text("utf-8", "replace")[-1000:]}
        write(out / "gpu.json", found)
        sys.stdout.write(f"{name}: {json.dumps(found[name])[:2000]}\n")
        sys.stdout.flush()
    return found


def ended(part: subprocess.Popen, limit: float) -> str | None:
    """Waits for a part, and ends it with all that it has started; how it failed, None where it did not."""
    try:
        code = part.wait(max(1.0, limit))
    except subprocess.TimeoutExpired:
        os.killpg(part.pid, signal.SIGKILL)  # its runs and their workers too, or they spoil what is timed next
        part.wait()
        return f"not done in {limit:.0f} s"
    return f"exit {code}" if code else None


def write(path: Path, data: Any) -> None:
    """JSON that appears whole."""
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    fresh.replace(path)


def main() -> int:
    """Runs the parts; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(LIMITS), help=", ".join([*LIMITS, *NAMED]))
    parser.add_argument("--small", action="store_true", help="tiny networks, for a try on the CPU")
    parser.add_argument("--data", type=Path, help="an image folder for `search`; generated images without")
    parser.add_argument("--steps", type=int, default=2000, help="of a selection of `search`")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts, slow = options.parts.split(","), SLOW if options.small else 1
    if strange := set(parts) - {*LIMITS, *NAMED}:
        parser.error(f"there is no part {', '.join(sorted(strange))}")
    command = [sys.executable, str(PARTS), str(options.out), *["--small"] * options.small]
    command += ["--steps", str(options.steps)]
    command += ["--data", str(options.data)] if options.data else []
    found = measure(parts, options.out, command, slow)
    return int(any("error" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
