"""A run from the checkpoint to its folder: nothing appears before everything is done."""

from dataclasses import dataclass
from pathlib import Path

from kcrprune.artifact.artifact import open_model
from kcrprune.config import RunConfig
from kcrprune.events import Listener
from kcrprune.measure.report import Comparison
from kcrprune.measure.summary import to_markdown
from kcrprune.pipeline import runs
from kcrprune.pipeline.run import Run


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path
    comparison: Comparison


def compress(checkpoint: Path, config: RunConfig, out: Path | None, listener: Listener) -> RunResult:
    """Compresses a checkpoint into a new run folder.

    Everything that can be refused is refused before anything is trained; the folder appears when all of it is done.
    """
    folder = runs.choose_folder(out, checkpoint, config.target_flops)
    run = Run(config, listener)
    with runs.appearing(folder) as working:
        with run.stage("load"):
            run.load(checkpoint)
        comparison = run.compress(working / runs.MODEL, folder / runs.MODEL)
        _write_reports(working, run, comparison)
    return RunResult(folder, comparison)


def _write_reports(folder: Path, run: Run, comparison: Comparison) -> None:
    plan = open_model(folder / runs.MODEL).plan
    assert plan is not None
    runs.write_json(folder / "plan.json", plan.model_dump(mode="json"))
    runs.write_json(folder / "report.json", comparison.model_dump(mode="json"))
    (folder / "report.md").write_text(to_markdown(comparison))
    (folder / "config.toml").write_text(runs.to_toml(run.config))
    runs.write_log(folder / "log.jsonl", run.histories)
    record = runs.machine_record() | {
        "input": {"path": str(run.opened.path), "sha256": run.opened.digest},
        "seed": run.config.seed,
        "stages": {stage.stage: stage.seconds for stage in comparison.stages},
        "peak_memory_mib": runs.peak_memory_mib(),
        "decisions": run.decisions,
    }
    runs.write_json(folder / runs.RECORD, record)
