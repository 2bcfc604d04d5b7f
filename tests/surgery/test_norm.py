"""A norm while channels are closed is the norm of those that are open; open gates change nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from kcrprune.surgery.norm import GatedNorm

OPEN = [0, 2, 3, 6]
GATE = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor(OPEN), 1)


def norm(kind: type[nn.Module]) -> Any:
    torch.manual_seed(0)
    made: Any = kind(8, eps=0.1)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made.double()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def narrow(dense: Any) -> Any:
    cut: Any = type(dense)(len(OPEN), eps=dense.eps).double()
    cut.load_state_dict({name: value[OPEN] for name, value in dense.state_dict().items()})
    return cut


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@torch.no_grad()
def test_open_gates_give_the_dense_norm_and_closed_ones_that_of_the_open_channels(kind: type[nn.Module]):
    dense, x = norm(kind), images(5, 3)
    whole = GatedNorm(dense, lambda: torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(whole(x), dense(x))
    for gated in (GatedNorm(dense, lambda: GATE), GatedNorm(dense, open=GATE)):
        torch.testing.assert_close(gated(x)[..., OPEN], narrow(dense)(x[..., OPEN]))
    assert GatedNorm(dense, open=GATE).state_dict().keys() == dense.state_dict().keys(), "the gate is no weight"
    assert whole.weight is dense.weight


@pytest.mark.parametrize("shape", [(2, 4), (2,), (6, 4), (2, 3, 5)])
@torch.no_grad()
def test_each_image_may_have_gates_of_its_own(shape: tuple[int, ...]):
    dense, x = norm(nn.LayerNorm), images(*shape)
    gates = torch.stack([GATE, torch.ones_like(GATE)])
    found = GatedNorm(dense, lambda: gates)(x)
    half = shape[0] // 2  # rows of the first image
    torch.testing.assert_close(found[:half][..., OPEN], narrow(dense)(x[:half][..., OPEN]))
    torch.testing.assert_close(found[half:], dense(x[half:]))


def test_gradients_reach_the_gates():
    gate = torch.full((8,), 0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: GatedNorm(norm(nn.LayerNorm), lambda: value)(images(3)), (gate,))
