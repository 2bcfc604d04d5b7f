"""What a loaded network remembers of where it comes from, so that it can be stored again when it was trained on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import nn

from kcrprune.artifact.artifact import MODEL_FILE, save_model
from kcrprune.artifact.given import ATTRIBUTE, Origin, save_origin
from kcrprune.checkpoints.dense import Opened
from kcrprune.checkpoints.loading import build_outline, check_outline
from kcrprune.containers.contents import shapes_of
from kcrprune.errors import CheckpointError, ConfigError, DivergedError
from kcrprune.families import classifiers, outputs_of

WRAPPERS: Final = ("module", "_orig_mod")  # what data parallelism, moving averages and compilation call the network
LASTING: Final = ("config", "dense_digest", "dense_macs")  # what a record says that stays true of other weights


def remembering(opened: Opened) -> nn.Module:
    """The network that was opened, with all but its weights noted on it."""
    setattr(opened.model, ATTRIBUTE, replace(opened, model=nn.Identity(), path=Path(), notes=()))
    return opened.model


def save_trained(model: nn.Module, folder: Path, class_names: Sequence[str] | None) -> Path:
    """Writes the artifact of a network that was trained on, in the type of its weights; returns its path.

    Figures of the old weights are left out. A classifier of another size takes `class_names`, or has none.
    ConfigError for a network that does not remember where it comes from, or has another structure by now;
    DivergedError for weights that are no finite numbers; OutputExistsError where `folder` holds a model.
    """
    model = _unwrapped(model)
    opened = getattr(model, ATTRIBUTE, None)
    if not isinstance(opened, Opened | Origin):
        raise ConfigError(
            f"this {type(model).__name__} does not come from kcrprune.load, so nothing tells how it was cut; give "
            "kcrprune.load's network the new weights by load_state_dict and save that, or compress a checkpoint of it"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DivergedError(f"{name} holds nan or infinite values: the training diverged; save an earlier state")
    if isinstance(opened, Origin):
        return save_origin(model, opened, folder)
    opened = _with_own_head(opened, model)
    try:
        check_outline(opened.architecture, opened.plan, shapes_of(model.state_dict()), Path("the network"))
    except CheckpointError as error:
        raise ConfigError(f"{error}: it is not what kcrprune.load gave any more, so it cannot be saved") from None
    names = tuple(class_names) if class_names is not None else opened.class_names
    if names is not None and len(names) != (count := _classes(model)):
        raise ConfigError(f"{len(names)} class names are given, and the network has {count} classes")
    path = Path(folder) / MODEL_FILE
    save_model(
        path,
        model,
        architecture=opened.architecture,
        plan=opened.plan,
        preprocessing=opened.preprocessing,
        class_names=names,
        record={name: opened.record[name] for name in LASTING if name in opened.record},
        outputs=opened.outputs,
    )
    return path


def _unwrapped(model: nn.Module) -> nn.Module:
    for name in WRAPPERS:
        if isinstance(inner := dict(model.named_children()).get(name), nn.Module):
            return _unwrapped(inner)
    return model


def _classes(model: nn.Module) -> int:
    last = classifiers(model)
    return last[0].out_features if last else 0


def _with_own_head(opened: Opened, model: nn.Module) -> Opened:
    """What the network was, with the number of classes that it has now."""
    count = _classes(model)
    if count == _classes(build_outline(opened.architecture, Path("the network"))):
        return opened
    arguments = {**opened.architecture.arguments, "num_classes": count}
    architecture = opened.architecture.model_copy(update={"arguments": arguments})
    return replace(opened, architecture=architecture, outputs=outputs_of(model), class_names=None)
