"""What a graph says about itself, as the flat text metadata that ONNX has room for."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kcrprune.errors import CheckpointError
from kcrprune.measure.report import BlockWidths, Count, block_widths
from kcrprune.plan import Architecture, ChannelPlan, Outputs, Preprocessing, canonical_json
from kcrprune.version import __version__

PREFIX = "kcrprune."
TEXTS = (str | None, Outputs | None)  # kinds of fields that stand as they are


class GraphRecord(BaseModel):
    """The metadata of an exported graph; in the file, every field is one key behind `kcrprune.`.

    Text stands as it is and everything else as canonical JSON. Keys that this version does not know are left alone,
    so that graphs of a newer one can be read.
    """

    model_config = ConfigDict(frozen=True)

    version: str | None = None  # of kcrprune
    architecture: str | None = None  # timm's name of the dense network
    family: str | None = None
    preprocessing: Preprocessing | None = None
    outputs: Outputs | None = None
    class_names: tuple[str, ...] | None = None
    plan_digest: str | None = None  # sha256 of the plan's canonical JSON
    blocks: tuple[BlockWidths, ...] | None = None
    parameters: Count | None = None
    macs: Count | None = None
    dense_macs: Annotated[Count, Field(gt=0)] | None = None

    def to_metadata(self) -> dict[str, str]:
        """The record as key and text; what is not known has no key."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {
            PREFIX + name: value if isinstance(value, str) else canonical_json(value) for name, value in values.items()
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """The record in a graph's metadata, empty in a stranger's; CheckpointError where a value is damaged."""
        return cls(
            **{
                name: _parsed(PREFIX + name, metadata[PREFIX + name], field.annotation)
                for name, field in cls.model_fields.items()
                if PREFIX + name in metadata
            }
        )


def _parsed(key: str, text: str, kind: Any) -> Any:
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(text) if kind in TEXTS else adapter.validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise CheckpointError(f"its metadata is damaged: {key}: {problem}") from error


def metadata_of(
    *,
    architecture: Architecture,
    preprocessing: Preprocessing,
    plan: ChannelPlan | None,
    outputs: Outputs,
    class_names: tuple[str, ...] | None,
    parameters: int,
    macs: int,
    dense_macs: int | None = None,
) -> dict[str, str]:
    """The metadata to export a network with; `plan` is None for a dense one."""
    digest = plan and hashlib.sha256(canonical_json(plan.model_dump(mode="json")).encode()).hexdigest()
    record = GraphRecord(
        version=__version__,
        architecture=architecture.name,
        family=architecture.family,
        preprocessing=preprocessing,
        outputs=outputs,
        class_names=class_names,
        plan_digest=digest,
        blocks=plan and block_widths(plan),
        parameters=parameters,
        macs=macs,
        dense_macs=dense_macs,
    )
    return record.to_metadata()
