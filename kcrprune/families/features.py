"""The features of an image: the pooled vector that enters the classifier."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from kcrprune.families.given import Given
from kcrprune.plan import Outputs


def classifiers(model: nn.Module) -> tuple[nn.Linear, ...]:
    """The last linear layers: one, two for a distilled network or one of two branches, none for a bare backbone."""
    found: Any = getattr(model, "get_classifier", nn.Identity)()
    heads = found if isinstance(found, tuple | nn.ModuleList) else (found,)
    linears = (
        [layer for layer in head.modules() if isinstance(layer, nn.Linear)] for head in heads if head is not None
    )
    return tuple(layers[-1] for layers in linears if layers)


def outputs_of(model: nn.Module) -> Outputs:
    """What the outputs of a network are where nobody says: classes behind a last linear layer, features without one."""
    return "classes" if classifiers(model) else "features"


class FeatureTap:
    """Keeps what enters the classifier during a forward pass; a context manager.

    `features` is (batch, d): the classifier's input, those of both classifiers side by side for a distilled network,
    or the output of a bare backbone; of a network in memory the mean, over the tokens of an image, of what the last
    branch of its part reads.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[Tensor] = []
        if isinstance(model, Given):
            self._given = model
            self._hooks = [model.get_submodule(model.tapped).register_forward_pre_hook(self._see_tokens)]
            return
        heads = classifiers(model)
        self._hooks = [head.register_forward_pre_hook(self._see_input) for head in heads]
        if not heads:
            self._hooks = [model.register_forward_hook(self._see_output)]

    def _see_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen.append(inputs[0])

    def _see_tokens(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        images = self._given.images
        tokens = inputs[0].flatten(2).mT if isinstance(module, nn.Conv2d) else inputs[0]
        self._seen.append(tokens.reshape(images, -1, tokens.shape[-1]).mean(1))

    def _see_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen.append(output)

    def take(self) -> Tensor:
        """The features of the last pass, (batch, d); the tap is empty afterwards."""
        features = torch.cat([x.flatten(1) for x in self._seen], dim=1)
        self._seen.clear()
        return features

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
