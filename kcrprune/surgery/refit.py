"""Closed-form correction of what a cut left.

Block after block, on the features that the already cut network produces: the linears that write to the residual
stream, proj and fc2, are fitted so that the cut network's stream comes back to the dense network's; those that read it,
qkv, fc1 and the merging of patches, so that what they kept of their outputs comes back to the dense network's; last the
classifier, to the dense network's logits. Every fit corrects the errors made so far as well, so it pays behind a cut
further up as much as behind one of its own. No training, no labels, one pass.
The closed form is that of optimal brain surgeon and its descendants (ZipLM, SlimGPT, CORP).

Letters: n tokens of all images, I inputs, O outputs; Z (n, I) inputs, Y (n, O) targets, W (O, I) weight, b (O,) bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite, classifiers
from kcrprune.plan import BlockPlan, ChannelPlan
from kcrprune.surgery.pruned import qkv_rows
from kcrprune.surgery.swap import layer_scale_at, linear_at
from kcrprune.surgery.tokens import as_attention_sees, input_of, real_tokens

CLASSIFIER_RIDGE = 100  # times the ridge of the blocks: a classifier sees one token of an image

Streams = list[Tensor]  # the residual stream of each batch of images
FitBlock = Callable[[nn.Module, Streams, Streams], None]  # (cut block, stream before it, dense stream behind it)


@dataclass
class NormalEquations:
    """Sums over tokens that a ridge regression needs, in float64, for inputs with a column of ones appended."""

    gram: Tensor  # (I + 1, I + 1)
    cross: Tensor  # (I + 1, O), inputs times residuals

    @classmethod
    def for_linear(cls, linear: nn.Linear) -> "NormalEquations":
        """Empty sums."""
        size, like = linear.in_features + 1, {"dtype": torch.float64, "device": linear.weight.device}
        return cls(torch.zeros(size, size, **like), torch.zeros(size, linear.out_features, **like))

    def add_(self, linear: nn.Linear, z: Tensor, y: Tensor) -> None:
        """Takes in tokens: inputs z (n, I), targets y (n, O)."""
        residual = y - nn.functional.linear(z, linear.weight, linear.bias)
        ones = torch.cat([z, z.new_ones(len(z), 1)], dim=1)
        self.gram += (ones.T @ ones).double()
        self.cross += (ones.T @ residual).double()

    def correction(self, ridge: float, *, bias: bool) -> Tensor:
        """The change of (W, b) that minimises squared residuals plus e times its own square, (O, I + 1).

        e is `ridge` times the mean squared input. The change 0 is among the candidates, so the squared residuals on
        this data never grow.
        """
        e = ridge * float(self.gram.diagonal()[:-1].mean()) + 1e-12
        penalty = torch.full_like(self.gram.diagonal(), e)
        penalty[-1] = 1e-6 * e if bias else 1e9 * float(self.gram.trace())  # free, or held at zero
        return torch.linalg.solve(self.gram + torch.diag(penalty), self.cross).T


@torch.no_grad()
def refit_(
    pruned: nn.Module,
    dense: nn.Module,
    sites: Sequence[BlockSite],
    plan: ChannelPlan,
    batches: Sequence[Tensor],
    *,
    ridge: float = 1e-3,
    fit_block: FitBlock | None = None,
    on_block: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Refits the linears of `pruned`, which was cut out of `dense`, towards `dense` on `batches` of images.

    `sites` are those of the dense model. The channels of a head must mean the same in both, so where heads were
    rotated `dense` is the rotated network. `fit_block` is called after the linears of each block, and may bring the
    block as a whole nearer to the dense stream. Memory: two residual streams of all images.
    """
    device = next(pruned.parameters()).device
    whole = _Pair(dense, pruned, ridge, device)
    dense_streams = [input_of(dense, sites[0].name, images.to(device)).cpu() for images in batches]
    cut_streams = [input_of(pruned, sites[0].name, images.to(device)).cpu() for images in batches]
    cut = False
    for done, (site, block) in enumerate(zip(sites, plan.blocks, strict=True), start=1):
        for name in site.entry:
            whole.at(name).refit_entry_(dense_streams, cut_streams, cut=cut)
        pair = whole.at(site.name)
        cut = cut or not (block.is_all and pair.equal)
        if cut:
            _refit_block_(pair, site, block, dense_streams, cut_streams, fit_block)
        else:
            pair.advance_(dense_streams, cut_streams)
        on_block(done)
    if cut:
        names = {module: name for name, module in pruned.named_modules()}
        for classifier in classifiers(pruned):
            whole.refit_reader_(names[classifier], batches, batches, strength=CLASSIFIER_RIDGE)
    return pruned


@dataclass(frozen=True)
class _Pair:
    """A module in its dense and its cut form."""

    dense: nn.Module
    cut: nn.Module
    ridge: float
    device: torch.device

    def at(self, name: str) -> "_Pair":
        """A part of both."""
        return replace(self, dense=self.dense.get_submodule(name), cut=self.cut.get_submodule(name))

    @property
    def equal(self) -> bool:
        """No weight differs; for modules of the same shapes."""
        weights = zip(self.cut.parameters(), self.dense.parameters(), strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in weights)

    def advance_(self, dense_streams: Streams, cut_streams: Streams) -> None:
        """Moves both streams behind the module, batch by batch in place."""
        _advance_(self.dense, dense_streams, self.device)
        _advance_(self.cut, cut_streams, self.device)

    def refit_entry_(self, dense_streams: Streams, cut_streams: Streams, *, cut: bool) -> None:
        """Refits what lies between two blocks where something was `cut` before, and moves both streams behind it."""
        for name in [name for name, module in self.cut.named_modules() if cut and isinstance(module, nn.Linear)]:
            self.refit_reader_(name, dense_streams, cut_streams)
        self.advance_(dense_streams, cut_streams)

    def refit_reader_(
        self,
        name: str,
        dense_in: Sequence[Tensor],
        cut_in: Sequence[Tensor],
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Fits the linear `name` to what it puts out in the dense module; `strength` multiplies the ridge.

        `rows` and `columns` are the dense outputs and inputs that the cut left to it; None is all of them.
        """
        linear = linear_at(self.cut, name)
        sums = NormalEquations.for_linear(linear)
        for dense_x, cut_x in zip(dense_in, cut_in, strict=True):
            z = input_of(self.cut, name, cut_x.to(self.device)).flatten(0, -2)
            y = linear_at(self.dense, name)(input_of(self.dense, name, dense_x.to(self.device))).flatten(0, -2)
            sums.add_(linear, _taken(z, columns), _taken(y, rows))
        _correct_(linear, sums, strength * self.ridge)

    def refit_proj_(self, site: BlockSite, dense_in: Streams, cut_in: Streams) -> None:
        """Fits proj of a block to what brings the stream behind attention to the dense one."""
        name = f"{site.attn}.proj"
        proj, gamma = linear_at(self.cut, name), self._layer_scale(site.scale1)
        sums = NormalEquations.for_linear(proj)
        for dense_stream, cut_stream in zip(dense_in, cut_in, strict=True):
            stream = cut_stream.to(self.device)
            z = input_of(self.cut, name, stream)
            target = input_of(self.dense, site.norm2, dense_stream.to(self.device))
            wanted = as_attention_sees(self.cut, site, target.view_as(stream) - stream)
            real = real_tokens(self.cut, site, stream)
            sums.add_(proj, z.flatten(0, -2)[real], wanted.flatten(0, -2)[real] / gamma)
        _correct_(proj, sums, self.ridge)

    def refit_fc2_(self, site: BlockSite, io: Sequence[int], dense_out: Streams, cut_in: Streams) -> None:
        """Fits fc2 of a block to what brings the stream behind the block to the dense one, in the channels `io`."""
        name = f"{site.mlp}.fc2"
        fc2, gamma = linear_at(self.cut, name), self._layer_scale(site.scale2)
        sums = NormalEquations.for_linear(fc2)
        for target, stream in zip(dense_out, cut_in, strict=True):
            stream = stream.to(self.device)
            z = input_of(self.cut, name, stream)
            middle = input_of(self.cut, site.norm2, stream)
            wanted = (target.to(self.device).view_as(middle) - middle) / gamma
            sums.add_(fc2, z.flatten(0, -2), _taken(wanted.flatten(0, -2), io))
        _correct_(fc2, sums, self.ridge)

    def _layer_scale(self, name: str | None) -> Tensor:
        """LayerScale's factors, kept off zero: a channel that is scaled by nothing needs no target."""
        if name is None:
            return torch.ones((), device=self.device)
        gamma = layer_scale_at(self.cut, name)
        return torch.where(gamma.abs() < 1e-8, torch.full_like(gamma, 1e8), gamma)


def _refit_block_(
    pair: _Pair,
    site: BlockSite,
    block: BlockPlan,
    dense_streams: Streams,
    cut_streams: Streams,
    fit_block: FitBlock | None,
) -> None:
    """Refits in the order of the forward pass, and moves both streams behind the block, batch by batch in place.

    qkv on the padding of windows too, which makes keys and values.
    """
    io, hidden = block.mlp_io.indices, block.mlp_hidden.indices
    pair.refit_reader_(f"{site.attn}.qkv", dense_streams, cut_streams, rows=qkv_rows(site, block))
    pair.refit_proj_(site, dense_streams, cut_streams)
    pair.refit_reader_(f"{site.mlp}.fc1", dense_streams, cut_streams, rows=hidden, columns=io)
    _advance_(pair.dense, dense_streams, pair.device)
    pair.refit_fc2_(site, io, dense_streams, cut_streams)
    if fit_block is not None:
        fit_block(pair.cut, cut_streams, dense_streams)
    _advance_(pair.cut, cut_streams, pair.device)


def _taken(tokens: Tensor, channels: Sequence[int] | None) -> Tensor:
    return tokens if channels is None else tokens[:, torch.tensor(channels, device=tokens.device)]


def _advance_(module: nn.Module, streams: Streams, device: torch.device) -> None:
    for index, stream in enumerate(streams):
        streams[index] = module(stream.to(device)).cpu()


def _correct_(linear: nn.Linear, sums: NormalEquations, ridge: float) -> None:
    change = sums.correction(ridge, bias=linear.bias is not None)  # (O, I + 1)
    linear.weight.add_(change[:, :-1].to(linear.weight))
    if linear.bias is not None:
        linear.bias.add_(change[:, -1].to(linear.bias))
