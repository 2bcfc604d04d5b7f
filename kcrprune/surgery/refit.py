"""Closed-form correction of what a cut left.

Block after block, on the features that the already cut network produces: the linears that write to the residual
stream (readers of groups) are fitted so that the cut network's stream comes back to the dense network's; those that
read it (writers of groups, the merging of patches), so that what they kept of their outputs comes back to the dense
network's, as do readers that no stream is known for; last the classifier, to the dense network's logits. Every fit
corrects the errors made so far as well, so it pays behind a cut further up as much as behind one of its own. No
training, no labels, one pass.
The closed form is that of optimal brain surgeon and its descendants (ZipLM, SlimGPT, CORP).

Letters: n tokens of all images, I inputs, O outputs; Z (n, I) inputs, Y (n, O) targets, W (O, I) weight, b (O,) bias.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from kcrprune.families import Group, classifiers
from kcrprune.families.given import glimpse, shown
from kcrprune.families.linears import channels_last, is_linear
from kcrprune.plan import ChannelPlan
from kcrprune.surgery.arranged import arranged
from kcrprune.surgery.balance import scale_of
from kcrprune.surgery.fits import Fit, fits_of, rows_of
from kcrprune.surgery.kept import Keep, on
from kcrprune.surgery.narrow import index_map
from kcrprune.surgery.normal_equations import Fitted, NormalEquations
from kcrprune.surgery.partial import (
    Block,
    RealTokens,
    Step,
    as_branch_sees,
    from_behind,
    input_of,
    read_by,
    real_tokens,
    seen_in,
    walk,
)
from kcrprune.surgery.replayed import Replayed
from kcrprune.surgery.swap import linear_at

CLASSIFIER_RIDGE = 100  # times the ridge of the blocks: a classifier sees one token of an image
STREAMS = 6  # dense and cut one, two inputs of a dense block's linears, the dense stream between its branches, a branch

Streams = list[Tensor]  # the residual stream of each batch of images
FitBlock = Callable[[nn.Module, Streams, Streams], None]  # (cut block, stream before it, dense stream behind it)


def memory_of_refit(dense: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> int:
    """Bytes of the streams that a refit holds at once: those of a ViT, and more than those of a Swin."""
    images = glimpse(batches[0]).to(next(dense.parameters()).device)
    of_one = input_of(dense, groups[0].block, images).nbytes / len(images)
    return round(STREAMS * of_one * sum(map(len, batches)))


@torch.no_grad()
def refit_(
    pruned: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    plan: ChannelPlan,
    batches: Sequence[Any],
    *,
    ridge: float = 1e-3,
    keep: Keep | None = None,
    fit_block: FitBlock | None = None,
    on_block: Callable[[int], None] = lambda done: None,
    begin: int = 0,
) -> nn.Module:
    """Refits the linears of `pruned`, which was cut out of `dense`, towards `dense` on `batches` of images.

    `groups` are those of the dense model, in the order of its forward pass. The channels of a head must mean the same
    in both, so where heads were rotated `dense` is the rotated network; its streams are brought to the plan's order
    here. `fit_block` is called after the linears of each block, and may bring the block as a whole nearer to the dense
    stream. The dense network runs once, in all; but the linears of a block that no stream leads through are fitted to
    their own dense outputs, each in a pass of its own.
    Memory: two residual streams of all images, and while a block is refitted one more for each of its branches but the
    last, and for each input of its linears and each of its branches in the dense network; all where `keep` puts
    them; None: on the device of the networks. The first `begin` blocks of `pruned` are refitted already.
    """
    device = next(pruned.parameters()).device
    dense, plan = arranged(dense, groups, plan)
    blocks = list(dict.fromkeys(group.block for group in groups))
    steps = walk(dense, blocks, [images.to(device, non_blocking=True) for images in shown(batches)])
    kept = index_map(dense, groups, plan)
    rows = rows_of(kept, device)
    keep = keep or on(device)
    whole = _Pair(dense, pruned, ridge, device, keep)
    dense_streams, cut_streams = [], []
    touched = {name.rpartition(".")[0] for name in kept}
    cut = False
    for done, step in enumerate(steps, start=1):
        if step.apart and not step.alone:
            whole.restart_(step.block, batches, dense_streams, cut_streams)
        for name in step.entry:
            whole.at(name).refit_entry_(dense_streams, cut_streams, cut=cut and done > begin)
        pair = whole.at(step.block)
        cut = cut or any(owner.startswith(f"{step.block}.") for owner in touched) or not pair.equal
        pair = replace(pair, dense=Block(pair.dense, step), cut=Block(pair.cut, step))
        here = [group for group in groups if group.block in step.holds]
        if step.alone:
            whole.refit_alone_(fits_of(dense, "", here, rows) if cut and done > begin else (), batches)
        elif cut and done > begin:
            _refit_block_(pair, fits_of(dense, step.block, here, rows), dense_streams, cut_streams, fit_block)
        else:
            pair.advance_(dense_streams, cut_streams)
        on_block(done)
    if cut:
        whole.refit_classifiers_(steps, batches, dense_streams, cut_streams)
    return pruned


@dataclass(frozen=True)
class _Pair:
    """A module in its dense and its cut form."""

    dense: nn.Module
    cut: nn.Module
    ridge: float
    device: torch.device
    keep: Keep

    def at(self, name: str) -> "_Pair":
        """A part of both."""
        return replace(self, dense=self.dense.get_submodule(name), cut=self.cut.get_submodule(name))

    @property
    def equal(self) -> bool:
        """No weight differs; for modules of the same shapes."""
        weights = zip(self.cut.parameters(), self.dense.parameters(), strict=True)
        return not torch.stack([(ours != theirs).any() for ours, theirs in weights]).any()

    def restart_(self, block: str, batches: Iterable[Any], dense_streams: Streams, cut_streams: Streams) -> None:
        """Takes both streams before a block from the images."""
        dense_streams.clear()
        cut_streams.clear()
        for images in _moved(batches, self.device):
            dense_streams.append(self.keep(input_of(self.dense, block, images)))
            cut_streams.append(self.keep(input_of(self.cut, block, images)))

    def refit_alone_(self, fits: Iterable[Fit], batches: Sequence[Any]) -> None:
        """Fits linears to their own dense outputs, from the images."""
        for fit in fits:
            self.refit_reader_(fit, self.from_images(fit, batches))

    def refit_classifiers_(
        self, steps: Sequence[Step], batches: Sequence[Any], dense_streams: Streams, cut_streams: Streams
    ) -> None:
        """Fits the last linears of a network to their dense outputs: of the streams where these lead there."""
        names = {module: name for name, module in self.cut.named_modules()}
        led = not any(step.alone for step in steps) and all(step.keeps and not step.apart for step in steps[1:])
        for name in [names[classifier] for classifier in classifiers(self.cut)]:
            if led:
                pairs = self.behind(steps, name, batches, dense_streams, cut_streams)
            else:
                pairs = self.from_images(Fit(name), batches)
            self.refit_reader_(Fit(name), pairs, strength=CLASSIFIER_RIDGE)

    def from_images(self, fit: Fit, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """What a fit takes of both, batch by batch, each in a pass of its own."""
        reads_all, (own, fitted) = self.reads_all(fit.name), self.fitted(fit)
        for images in _moved(batches, self.device):
            x = read_by(self.dense, fit.name, images)
            constant = fitted.weight.shape[1] == 0  # of a branch that went, whose linear nobody calls
            z = x[..., :0] if constant else read_by(self.cut, fit.name, images)
            yield x if reads_all else own(x), z

    def fitted(self, fit: Fit) -> tuple[Fitted, Fitted]:
        """The linear of a fit in the dense module and in the cut one."""
        parts = [(linear_at(of, fit.name), fit.norm and of.get_submodule(fit.norm)) for of in (self.dense, self.cut)]
        return tuple(Fitted(linear, cast("BatchNorm | None", norm)) for linear, norm in parts)  # type: ignore[return-value]

    def advance_(self, dense_streams: Streams, cut_streams: Streams) -> None:
        """Moves both streams behind the module, batch by batch in place."""
        for module, streams in ((self.dense, dense_streams), (self.cut, cut_streams)):
            for index, stream in enumerate(_moved(streams, self.device)):
                streams[index] = self.keep(module(stream))

    def refit_entry_(self, dense_streams: Streams, cut_streams: Streams, *, cut: bool) -> None:
        """Refits what lies between two blocks where something was `cut` before, and moves both streams behind it."""
        for name in [name for name, module in self.cut.named_modules() if cut and is_linear(module)]:
            moved = (_moved(pair, self.device) for pair in zip(dense_streams, cut_streams, strict=True))
            self.refit_reader_(
                Fit(name), ((read_by(self.dense, name, x), read_by(self.cut, name, z)) for x, z in moved)
            )
        self.advance_(dense_streams, cut_streams)

    def behind(
        self, steps: Sequence[Step], name: str, batches: Iterable[Any], dense_streams: Streams, cut_streams: Streams
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the linear `name` behind all blocks reads in both, batch by batch, of the streams behind them."""
        with from_behind(self.dense, steps) as dense, from_behind(self.cut, steps) as cut:
            for images, *streams in zip(_moved(batches, self.device), dense_streams, cut_streams, strict=True):
                dense.now, cut.now = _moved(streams, self.device)
                yield read_by(self.dense, name, images), read_by(self.cut, name, images)

    def refit_reader_(
        self,
        fit: Fit,
        pairs: Iterable[tuple[Tensor, Tensor]],
        *,
        strength: float = 1.0,
    ) -> None:
        """Fits a linear to what it puts out in the dense module; `strength` multiplies the ridge.

        `pairs` are what it reads in the dense module and in the cut one, batch by batch; where the cut took inputs from
        it, what it puts out in the dense module and reads in the cut one.
        """
        wanted, fitted = self.fitted(fit)
        whole = self.reads_all(fit.name)
        outputs, inputs = fitted.weight.shape
        sums = NormalEquations.empty(inputs, inputs if whole else outputs, self.device)
        for pair in pairs:
            x, z = (tensor.flatten(0, -2) for tensor in pair)
            sums.add_(z, x - z if whole else _taken(x, fit.rows) - fitted(z))
        fitted.correct_(sums.behind(wanted, fitted, fit.rows) if whole else sums, strength * self.ridge)

    def reads_all(self, name: str) -> bool:
        """Whether the cut took no inputs from a linear."""
        return linear_at(self.cut, name).weight.shape[1] == linear_at(self.dense, name).weight.shape[1]

    def targets_(self, fits: Sequence[Fit], dense_streams: Streams) -> dict[str, Streams]:
        """What the fits of a block need of the dense one, by fit, from the pass that moves its streams behind it.

        For a linear that reads the stream, its inputs, or its outputs where the cut took inputs from it; for one that
        writes to it, the stream before the next branch.
        """
        by_name = {fit.name: fit for fit in fits}
        reading = [fit.name for fit in fits if fit.before is None]
        behind = {fit.name: fit.behind for fit in fits if fit.before is not None and fit.behind is not None}
        found: dict[str, Streams] = {name: [] for name in (*reading, *behind)}
        for index, stream in enumerate(dense_streams):
            [moved] = _moved([stream], self.device)
            seen = seen_in(self.dense, moved, linears=reading, modules=list(behind.values()), to_end=True)
            dense_streams[index] = self.keep(seen[""])
            kept: dict[int, Tensor] = {}  # several linears may read the same tensor
            for name, of_all in found.items():
                tensor = seen[behind.get(name, name)]
                if name in behind or self.reads_all(name):
                    if id(tensor) not in kept:
                        kept[id(tensor)] = self.keep(tensor)
                    of_all.append(kept[id(tensor)])
                else:
                    of_all.append(self.keep(self.fitted(by_name[name])[0](tensor)))
        return found

    def refit_to_stream_(self, fit: Fit, targets: Streams, cut_in: Replayed) -> None:
        """Fits a linear that writes to the stream to what brings the stream behind it to the dense one, `targets`."""
        assert fit.before is not None
        _, fitted = self.fitted(fit)
        gamma, shift = self._affine(fit, fitted)
        outputs, inputs = fitted.weight.shape
        sums = NormalEquations.empty(inputs, outputs, self.device)
        known: dict[torch.Size, RealTokens | None] = {}  # by the shape of an image's stream
        for target, stream in zip(_moved(targets, self.device), cut_in, strict=True):
            seen = seen_in(self.cut, stream, linears=(fit.name,), modules=(fit.before,))
            z, before = seen[fit.name].flatten(0, -2), seen[fit.before]
            wanted = channels_last(fitted.linear, target.view_as(before) - before)
            if stream.shape[1:] not in known:
                known[stream.shape[1:]] = self._reordered(fit, stream)
            if (real := known[stream.shape[1:]]) is not None:
                wanted = as_branch_sees(self.cut, fit.before, fit.site, stream, lambda _, wanted=wanted: wanted)
                wanted, z = real.of(wanted.flatten(0, -2)), real.of(z)
            wanted = _taken(((wanted - shift) / gamma).flatten(0, -2), fit.rows)
            sums.add_(z, wanted - fitted(z))
        fitted.correct_(sums, self.ridge)

    def refit_constant_(self, fit: Fit, targets: Streams, cut_in: Replayed) -> None:
        """Moves what is left of a branch that went to the mean of what brings the stream behind it to `targets`."""
        assert fit.before is not None
        _, fitted = self.fitted(fit)
        gamma, shift = self._affine(fit, fitted)
        sums = NormalEquations.empty(0, len(fitted.bias), self.device)
        for target, stream in zip(_moved(targets, self.device), cut_in, strict=True):
            before = input_of(self.cut, fit.before, stream)
            wanted = channels_last(fitted.linear, target.view_as(before) - before)
            missing = ((wanted - shift) / gamma - fitted.bias).flatten(0, -2)
            sums.add_(missing[:, :0], missing)
        fitted.correct_(sums, self.ridge)

    def _reordered(self, fit: Fit, stream: Tensor) -> RealTokens | None:
        """Where a branch sees the tokens of the stream in another order (windows), or others beside them, those."""
        assert fit.before is not None

        def places(of: Tensor) -> Tensor:
            return torch.arange(of.numel(), device=of.device).view_as(of).to(of.dtype)

        if fit.before == fit.site:  # no norm lies between
            return None
        seen = as_branch_sees(self.cut, fit.before, fit.site, stream, places)
        if torch.equal(seen.flatten(), places(seen).flatten()):
            return None
        return real_tokens(self.cut, fit.before, fit.site, stream)

    def _affine(self, fit: Fit, fitted: Fitted) -> tuple[Tensor, Tensor]:
        """Factor and shift, of a batch norm and LayerScale, that a linear's outputs reach the stream through.

        Factors are kept off zero: a channel that is scaled by nothing needs no target.
        """
        gamma = torch.ones((), device=self.device) if fit.scale is None else scale_of(self.cut, fit.scale)
        shift = torch.zeros((), device=self.device)
        if (norm := fitted.norm) is not None:
            assert norm.running_var is not None
            gamma, shift = gamma * norm.weight * (norm.running_var + norm.eps).rsqrt(), gamma * norm.bias
        return torch.where(gamma.abs() < 1e-8, torch.full_like(gamma, 1e8), gamma), shift


def _refit_block_(
    pair: _Pair,
    fits: Iterable[Fit],
    dense_streams: Streams,
    cut_streams: Streams,
    fit_block: FitBlock | None,
) -> None:
    """Refits in the order of the forward pass, and moves both streams behind the block, batch by batch in place.

    What makes keys and values is fitted on the padding of windows too.
    """
    fits = list(fits)
    targets, cut_in = pair.targets_(fits, dense_streams), Replayed(pair.cut, cut_streams, pair.device, pair.keep)
    last = [fit for fit in fits if fit.before is not None and fit.behind is None]  # of a block
    for fit in [fit for fit in fits if fit not in last] + last:
        if fit.before is None:
            read = (read_by(pair.cut, fit.name, stream) for stream in cut_in)
            pair.refit_reader_(fit, zip(_moved(targets.pop(fit.name), pair.device), read, strict=True))
        else:
            to_stream_ = pair.refit_to_stream_ if pair.fitted(fit)[1].weight.shape[1] else pair.refit_constant_
            to_stream_(fit, targets.pop(fit.name, dense_streams), cut_in)
        if fit.behind is not None:  # nothing of this branch is left to fit
            cut_in.replay_(fit.site)
    if fit_block is not None:
        cut_in.return_()
        fit_block(pair.cut, cut_streams, dense_streams)
    cut_in.advance_()
    cut_in.return_()


def _moved(tensors: Iterable[Any], device: torch.device) -> Iterator[Any]:
    return (tensor.to(device, non_blocking=True) for tensor in tensors)


def _taken(tokens: Tensor, channels: Tensor | None) -> Tensor:
    return tokens if channels is None else tokens.index_select(1, channels)
