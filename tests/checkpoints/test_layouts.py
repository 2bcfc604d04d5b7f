"""Every layout: the foreign library's output equals that of the opened network."""

import pytest
import torch

from kcrprune.artifact.artifact import open_model
from kcrprune.checkpoints.layouts import LAYOUTS
from tests.checkpoints.foreign import FOREIGN, Foreign

pytestmark = pytest.mark.filterwarnings("ignore")  # the foreign libraries' own, when they build and save


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.label)
@torch.no_grad()
def test_opened_network_computes_what_the_foreign_one_does(foreign: Foreign, tmp_path):
    model = foreign.model()
    images = torch.randn(2, 3, foreign.size, foreign.size, generator=torch.Generator().manual_seed(1))
    opened = open_model(foreign.save(model, tmp_path), **foreign.options)
    assert opened.layout.startswith(foreign.layout + ",")
    assert_close(opened.model(images), foreign.output(model, images))


def test_every_layout_has_a_foreign_checkpoint():
    assert {layout.name for layout in LAYOUTS} == {foreign.layout for foreign in FOREIGN}


def test_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(torch.ones(2), torch.ones(2) + 1e-3)
