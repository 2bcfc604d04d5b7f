"""Closed-form correction of what a cut left.

Block after block, on the features that the already cut network produces: the linears that write to the residual
stream, proj and fc2, are fitted so that the cut network's stream comes back to the dense network's; those that read it,
qkv and fc1, so that what they kept of their outputs comes back to the dense network's; last the classifier, to the
dense network's logits. Every fit corrects the errors made so far as well, so it pays behind a cut further up as much as
behind one of its own. No training, no labels, one pass.
The closed form is that of optimal brain surgeon and its descendants (ZipLM, SlimGPT, CORP).

Letters: n tokens of all images, I inputs, O outputs; Z (n, I) inputs, Y (n, O) targets, W (O, I) weight, b (O,) bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kcrprune.families import BlockSite, classifiers
from kcrprune.plan import BlockPlan, ChannelPlan
from kcrprune.surgery.pruned import qkv_rows
from kcrprune.surgery.swap import layer_scale_at, linear_at
from kcrprune.surgery.tokens import as_attention_sees, input_of, real_tokens

CLASSIFIER_RIDGE = 100  # times the ridge of the blocks: a classifier sees one token of an image

Streams = list[Tensor]  # the residual stream of each batch of images


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
    on_block: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Refits the linears of `pruned`, which was cut out of `dense`, towards `dense` on `batches` of images.

    `sites` are those of the dense model. The channels of a head must mean the same in both, so where heads were
    rotated `dense` is the rotated network. Memory: two residual streams of all images.
    """
    device = next(pruned.parameters()).device
    dense_streams = [input_of(dense, sites[0].name, images.to(device)).cpu() for images in batches]
    cut_streams = [input_of(pruned, sites[0].name, images.to(device)).cpu() for images in batches]
    cut = False
    for done, (site, block) in enumerate(zip(sites, plan.blocks, strict=True), start=1):
        for name in site.entry:
            _advance_(dense.get_submodule(name), dense_streams, device)
            _advance_(pruned.get_submodule(name), cut_streams, device)
        pair = _BlockPair(dense.get_submodule(site.name), pruned.get_submodule(site.name), site, block, ridge, device)
        cut = cut or pair.differ
        if cut:
            pair.refit_(dense_streams, cut_streams)
        else:
            pair.pass_by_(dense_streams, cut_streams)
        on_block(done)
    if cut:
        _refit_classifiers_(pruned, dense, batches, CLASSIFIER_RIDGE * ridge)
    return pruned


@dataclass
class _BlockPair:
    """One block in its dense and its cut form."""

    dense: nn.Module
    cut: nn.Module
    site: BlockSite
    block: BlockPlan
    ridge: float
    device: torch.device

    @property
    def differ(self) -> bool:
        """Something was cut, or trained since."""
        weights = zip(self.cut.parameters(), self.dense.parameters(), strict=True)
        return not (self.block.is_all and all(torch.equal(ours, theirs) for ours, theirs in weights))

    def refit_(self, dense_streams: Streams, cut_streams: Streams) -> None:
        """Refits in the order of the forward pass, and moves both streams behind the block, batch by batch in place."""
        self._refit_qkv_(dense_streams, cut_streams)
        self._refit_proj_(dense_streams, cut_streams)
        self._refit_fc1_(dense_streams, cut_streams)
        _advance_(self.dense, dense_streams, self.device)
        self._refit_fc2_(dense_streams, cut_streams)
        _advance_(self.cut, cut_streams, self.device)

    def pass_by_(self, dense_streams: Streams, cut_streams: Streams) -> None:
        """Moves both streams behind a block that is the dense one, as are those before it."""
        _advance_(self.dense, dense_streams, self.device)
        _advance_(self.cut, cut_streams, self.device)

    def _refit_qkv_(self, dense_in: Streams, cut_in: Streams) -> None:
        name = f"{self.site.attn}.qkv"
        qkv = linear_at(self.cut, name)
        sums = NormalEquations.for_linear(qkv)
        rows = torch.tensor(qkv_rows(self.site, self.block), device=self.device)
        for dense_stream, cut_stream in zip(dense_in, cut_in, strict=True):
            z, y = self._input_and_wanted(name, dense_stream, cut_stream)
            sums.add_(qkv, z, y[:, rows])  # window padding included: it makes keys and values too
        _correct_(qkv, sums, self.ridge)

    def _refit_proj_(self, dense_in: Streams, cut_in: Streams) -> None:
        proj = linear_at(self.cut, f"{self.site.attn}.proj")
        gamma = self._layer_scale(self.site.scale1)
        sums = NormalEquations.for_linear(proj)
        for dense_stream, cut_stream in zip(dense_in, cut_in, strict=True):
            stream = cut_stream.to(self.device)
            z = input_of(self.cut, f"{self.site.attn}.proj", stream)
            target = input_of(self.dense, self.site.norm2, dense_stream.to(self.device))
            wanted = as_attention_sees(self.cut, self.site, target.view_as(stream) - stream)
            real = real_tokens(self.cut, self.site, stream)
            sums.add_(proj, z.flatten(0, -2)[real], wanted.flatten(0, -2)[real] / gamma)
        _correct_(proj, sums, self.ridge)

    def _refit_fc1_(self, dense_in: Streams, cut_in: Streams) -> None:
        name = f"{self.site.mlp}.fc1"
        fc1 = linear_at(self.cut, name)
        sums = NormalEquations.for_linear(fc1)
        io = torch.tensor(self.block.mlp_io.indices, device=self.device)
        hidden = torch.tensor(self.block.mlp_hidden.indices, device=self.device)
        for dense_stream, cut_stream in zip(dense_in, cut_in, strict=True):
            z, y = self._input_and_wanted(name, dense_stream, cut_stream)
            sums.add_(fc1, z[:, io], y[:, hidden])
        _correct_(fc1, sums, self.ridge)

    def _input_and_wanted(self, name: str, dense_stream: Tensor, cut_stream: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that the linear `name` reads in the cut block (n, D), and what it makes of them in the dense one."""
        z = input_of(self.cut, name, cut_stream.to(self.device))
        y = linear_at(self.dense, name)(input_of(self.dense, name, dense_stream.to(self.device)))
        return z.flatten(0, -2), y.flatten(0, -2)

    def _refit_fc2_(self, dense_out: Streams, cut_in: Streams) -> None:
        fc2 = linear_at(self.cut, f"{self.site.mlp}.fc2")
        io = torch.tensor(self.block.mlp_io.indices, device=self.device)
        gamma = self._layer_scale(self.site.scale2)
        sums = NormalEquations.for_linear(fc2)
        for target, stream in zip(dense_out, cut_in, strict=True):
            stream = stream.to(self.device)
            z = input_of(self.cut, f"{self.site.mlp}.fc2", stream)
            middle = input_of(self.cut, self.site.norm2, stream)
            wanted = (target.to(self.device).view_as(middle) - middle) / gamma
            sums.add_(fc2, z.flatten(0, -2), wanted.flatten(0, -2)[:, io])
        _correct_(fc2, sums, self.ridge)

    def _layer_scale(self, name: str | None) -> Tensor:
        """LayerScale's factors, kept off zero: a channel that is scaled by nothing needs no target."""
        if name is None:
            return torch.ones((), device=self.device)
        gamma = layer_scale_at(self.cut, name)
        return torch.where(gamma.abs() < 1e-8, torch.full_like(gamma, 1e8), gamma)


def _refit_classifiers_(pruned: nn.Module, dense: nn.Module, batches: Sequence[Tensor], ridge: float) -> None:
    names = {module: name for name, module in pruned.named_modules()}
    for classifier in classifiers(pruned):
        name, device = names[classifier], classifier.weight.device
        sums = NormalEquations.for_linear(classifier)
        for images in batches:
            z, dense_z = (input_of(model, name, images.to(device)) for model in (pruned, dense))
            sums.add_(classifier, z, linear_at(dense, name)(dense_z))
        _correct_(classifier, sums, ridge)


def _advance_(module: nn.Module, streams: Streams, device: torch.device) -> None:
    for index, stream in enumerate(streams):
        streams[index] = module(stream.to(device)).cpu()


def _correct_(linear: nn.Linear, sums: NormalEquations, ridge: float) -> None:
    change = sums.correction(ridge, bias=linear.bias is not None)  # (O, I + 1)
    linear.weight.add_(change[:, :-1].to(linear.weight))
    if linear.bias is not None:
        linear.bias.add_(change[:, -1].to(linear.bias))
