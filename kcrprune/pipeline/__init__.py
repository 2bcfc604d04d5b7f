"""The verbs of kcrprune, each a short story told in order; computes nothing itself."""

from kcrprune.graphs import ExportResult
from kcrprune.pipeline.compress import RunResult, compress
from kcrprune.pipeline.demo import demo
from kcrprune.pipeline.verbs import evaluate, export, inspect, report

__all__ = ["ExportResult", "RunResult", "compress", "demo", "evaluate", "export", "inspect", "report"]
