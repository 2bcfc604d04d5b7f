"""The verbs of kcrprune, each a short story told in order; computes nothing itself."""

from kcrprune.graphs import ExportResult
from kcrprune.pipeline.compress import RunResult, compress
from kcrprune.pipeline.demo import demo
from kcrprune.pipeline.given import GivenResult, compress_given
from kcrprune.pipeline.listing import Listing, listing
from kcrprune.pipeline.verbs import Ported, evaluate, export, inspect, port, port_into, report

__all__ = [
    "ExportResult",
    "GivenResult",
    "Listing",
    "Ported",
    "RunResult",
    "compress",
    "compress_given",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "listing",
    "port",
    "port_into",
    "report",
]
