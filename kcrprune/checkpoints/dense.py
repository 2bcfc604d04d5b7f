"""Any dense network from a file or folder: recognised, brought to timm's names, checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from kcrprune.checkpoints.clues import ASKED, Clues, Evidence
from kcrprune.checkpoints.hub import Fetched, require_present
from kcrprune.checkpoints.inference import Inferred, infer
from kcrprune.checkpoints.layouts.base import Tensors
from kcrprune.checkpoints.layouts.renaming import with_norm
from kcrprune.checkpoints.layouts.timm import REGISTERED
from kcrprune.checkpoints.loading import check_finite, load_dense
from kcrprune.checkpoints.locate import Located, locate
from kcrprune.checkpoints.outputs import outputs_of_file
from kcrprune.checkpoints.preprocessing import Flags, preprocessing_of
from kcrprune.checkpoints.shapes import classes_of
from kcrprune.checkpoints.statements import stated
from kcrprune.containers.container import open_container
from kcrprune.containers.contents import digest, read_all, shapes_of
from kcrprune.errors import ConfigError, UnsupportedModelError
from kcrprune.families import classifiers, family_of
from kcrprune.plan import Architecture, ChannelPlan, Outputs, Preprocessing, as_sides, sides, size_text


@dataclass(frozen=True)
class Opened:
    """A network that was opened from disk; one type for every source. `model` is in eval mode, float32, on the CPU."""

    model: nn.Module
    architecture: Architecture
    preprocessing: Preprocessing
    plan: ChannelPlan | None  # None: a dense network
    outputs: Outputs
    class_names: tuple[str, ...] | None  # None: not known, or features
    layout: str  # for people: "torchvision Swin", "kcrprune artifact"
    notes: tuple[str, ...]  # how each thing is known, one sentence each
    path: Path
    digest: str  # sha256 of the file or files
    file_bytes: int
    record: dict[str, Any] = field(default_factory=dict)  # the run that made an artifact
    new_head: bool = False  # the classifier is not the file's, and untrained
    foreign_names: tuple[str, ...] = ()  # what a pickle mentions and nobody runs
    fetched: Fetched | None = None  # what it was opened for, where that is a name of the hub

    @property
    def source(self) -> str:
        """What people know it by: a path, or a repository with its revision."""
        return self.fetched.source if self.fetched else str(self.path)

    @property
    def class_count(self) -> int:
        """How many classes the outputs are of; 0 for features."""
        return classifiers(self.model)[0].out_features if self.outputs == "classes" else 0

    @property
    def feature_count(self) -> int:
        """How many channels the features have; 0 for classes."""
        if self.outputs == "classes":
            return 0
        last = classifiers(self.model)
        return last[0].out_features if last else int(self.model.head_hidden_size)  # type: ignore[arg-type]


def open_dense(
    path: Path,
    *,
    arch: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    outputs: Outputs | None = None,
) -> Opened:
    """The dense network in a checkpoint that somebody else wrote; the keywords are the user's own words.

    CheckpointError for a file that is damaged, unknown or not clear; UnsupportedModelError for a network that cannot
    be cut; ConfigError for a keyword that contradicts the file.
    """
    path = Path(path)
    require_present(path)
    contents = open_container(path)
    located = locate(contents)
    read = read_all(located.refs, contents.nbytes, path)
    check_finite(read, path)
    tensors, norm_notes = _converted(located, read)
    shapes = shapes_of(tensors)
    classes = classes_of(shapes)
    flags = Clues(source=ASKED, name=arch, arguments={} if num_heads is None else {"num_heads": num_heads})
    clues = (flags, *stated(contents, located, classes), located.layout.clues(contents.config, shapes))
    evidence = Evidence(clues, as_sides(img_size))
    require_clear(located, evidence, path)
    inferred = infer(shapes, evidence, path)
    sized, size_notes = with_size(inferred, evidence.asked_size)
    final, head_notes = with_head(sized, num_classes, path)
    new_head = bool(num_classes) and classes == 0
    model, left_out = load_dense(final.architecture, tensors, path, own=inferred.architecture, new_head=new_head)
    named = evidence.class_names is not None
    known, output_notes = outputs_of_file(
        model, outputs, final.architecture, located.layout, named=named, new_head=new_head
    )
    return Opened(
        model=model,
        architecture=final.architecture.model_copy(update={"family": family_of(model)}),
        preprocessing=preprocessing_of(final, evidence, Flags(mean, std, interpolation, crop_pct)),
        plan=None,
        outputs=known,
        class_names=evidence.class_names if known == "classes" else None,
        layout=f"{located.layout.name}, {contents.container}",
        notes=(
            *(*located.notes(left_out), *_called(evidence), *inferred.notes),
            *(*norm_notes, *size_notes, *head_notes, *output_notes),
        ),
        path=path,
        digest=digest(contents.files),
        file_bytes=contents.nbytes,
        new_head=new_head,
        foreign_names=contents.foreign_names,
    )


def _converted(located: Located, read: Tensors) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors under timm's names, and a sentence on what the file lacks."""
    tensors = located.layout.convert(read)
    return (tensors, ()) if located.layout is REGISTERED else with_norm(tensors)


def require_clear(located: Located, evidence: Evidence, path: Path) -> None:
    """UnsupportedModelError where tensors of equal names are used in several ways and nothing says in which."""
    layout = located.layout
    by_wrapper = layout.settled_by == "wrapper" and located.trail and not evidence.called
    if layout.doubt and not (evidence.names or by_wrapper or evidence.argument(layout.settled_by)[1]):
        raise UnsupportedModelError(f"{path}: {layout.doubt}{''.join(f' ({note})' for note in _called(evidence))}")


def _called(evidence: Evidence) -> tuple[str, ...]:
    return (f"{evidence.called}, a name that timm does not know",) if evidence.called else ()


def with_size(inferred: Inferred, img_size: int | tuple[int, int] | None) -> tuple[Inferred, tuple[str, ...]]:
    """The same network at the image size that the user asks for."""
    own, patch = inferred.img_size, inferred.patch_size
    if img_size is None or img_size == own:
        return inferred, ()
    if any(side % patch for side in sides(img_size)):
        raise ConfigError(f"--img-size {size_text(img_size)} is no multiple of the patch size {patch}")
    change = f"image size {size_text(img_size)} in place of {size_text(own)}"
    note = f"{change}: {ASKED}; timm resizes the position tables whose size changes"
    return inferred.changed(img_size=img_size), (note,)


def with_head(inferred: Inferred, num_classes: int | None, path: Path) -> tuple[Inferred, tuple[str, ...]]:
    """The network with a new classifier where the file has none and the user asks for one."""
    own = inferred.num_classes
    if num_classes is None or num_classes == own:
        return inferred, ("no classifier in the file; --num-classes gives it a new one",) if own == 0 else ()
    if own:
        raise ConfigError(f"{path} has a classifier for {own} classes; --num-classes {num_classes} contradicts it")
    return inferred.changed(num_classes=num_classes), (
        f"a new, untrained classifier for {num_classes} classes: as asked",
    )
