"""The counter of passes by formula and by torch's own; what it cannot count is named and never passed over."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kcrprune.errors import UnsupportedModelError
from kcrprune.measure.macs import PRODUCTS, count_macs, counting, require_counted


class Does(nn.Module):
    """A module that does one thing to what it is given."""

    def __init__(self, act):
        super().__init__()
        self.act, self.weight = act, nn.Parameter(torch.ones(3))

    def forward(self, *inputs):
        return self.act(*inputs)


def counted(module, *inputs):
    with torch.no_grad(), counting(module) as counter:
        module(*inputs)
    return require_counted(counter)


def attention(*widths, queries=5, keys=7):
    query, key, value = (
        torch.ones(2, 3, count, width) for count, width in zip((queries, keys, keys), widths, strict=True)
    )
    return nn.functional.scaled_dot_product_attention, query, key, value


@pytest.mark.parametrize(
    ("module", "inputs", "macs"),
    [
        (nn.Linear(4, 6), [torch.ones(5, 4)], 5 * 4 * 6),
        (nn.Linear(4, 6, bias=False), [torch.ones(2, 5, 4)], 2 * 5 * 4 * 6),
        (Does(torch.bmm), [torch.ones(3, 5, 4), torch.ones(3, 4, 2)], 3 * 5 * 4 * 2),
        (Does(torch.baddbmm), [torch.ones(3, 5, 2), torch.ones(3, 5, 4), torch.ones(3, 4, 2)], 3 * 5 * 4 * 2),
        (Does(torch.mv), [torch.ones(5, 4), torch.ones(4)], 5 * 4),
        (Does(torch.dot), [torch.ones(9), torch.ones(9)], 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), [torch.ones(2, 4, 8, 8)], 2 * 6 * 16 * 9 * 4 // 2),
        (nn.Conv1d(4, 6, 3, bias=False), [torch.ones(2, 4, 8)], 2 * 6 * 6 * 3 * 4),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), [torch.ones(2, 4, 5, 5)], 2 * 4 * 25 * 4 * 6 // 2),
        (nn.MultiheadAttention(8, 2, batch_first=True).eval(), [torch.ones(2, 5, 8)] * 3, 2 * (20 * 64 + 2 * 25 * 8)),
        (nn.Upsample(scale_factor=2, mode="bilinear"), [torch.ones(1, 2, 4, 4)], 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_products_cost_what_the_formula_says(module, inputs, macs):
    assert counted(module, *inputs) == macs
    if not (isinstance(module, Does) and module.act in (torch.mv, torch.dot)):  # which torch's own counts as nothing
        with torch.no_grad(), FlopCounterMode(display=False) as other:
            torch.backends.mha.set_fastpath_enabled(False)
            module(*inputs)
            torch.backends.mha.set_fastpath_enabled(True)
        assert other.get_total_flops() == 2 * macs


@pytest.mark.parametrize("widths", [(4, 4, 4), (4, 4, 6), (2, 2, 8)])
def test_attention_costs_its_queries_times_its_keys_times_both_widths(widths):
    act, *inputs = attention(*widths)
    assert counted(Does(act), *inputs) == 2 * 3 * 5 * 7 * (widths[0] + widths[2])


def test_what_runs_beside_the_part_is_not_counted_and_what_calls_it_twice_counts_twice():
    part, beside = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad(), counting(part) as counter:
        part(beside(part(torch.ones(3, 4))))
    assert (counter.total, counter.calls) == (2 * 3 * 16, 2)
    part(torch.ones(3, 4))
    assert counter.total == 2 * 3 * 16, "it has ended"


def test_a_part_that_fails_is_left_as_it_was():
    part, fast = Does(lambda x: x @ torch.ones(9, 9)), torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError), counting(part):
        part(torch.ones(2, 2))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not part._forward_hooks
    assert not part._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("addbmm", ((5, 2), (3, 5, 4), (3, 4, 2))), ("addmv", ((5,), (5, 4), (4,))), ("addr", ((5, 4), (5,), (4,)))],
)
def test_products_that_nobody_counts_are_named(name, shapes):
    product = Does(lambda x: getattr(torch, name)(*map(torch.ones, shapes)).sum() + x.sum())
    with pytest.raises(UnsupportedModelError, match=name):
        counted(product, torch.ones(1))
    with pytest.raises(UnsupportedModelError, match=name):
        count_macs(product, (3, 4, 4))


def test_one_image_is_counted_and_training_comes_back():
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.Dropout(), Does(lambda x: torch.mv(x[0, 0], x[0, 0, 0])))
    assert count_macs(model, (3, 4, 5)) == 6 * 2 * 3 * 27 + 2 * 3
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_a_recurrence_costs_its_weights_at_every_step(kind, gates):
    once = gates * (6 + 5) * 5 + gates * (2 * 5 + 5) * 5  # two layers; the second reads both directions
    assert counted(kind(6, 5, 2, bidirectional=True, batch_first=True), torch.ones(3, 4, 6)) == 3 * 4 * 2 * once


def test_what_a_library_takes_at_once_costs_the_same():
    weights = [torch.ones(20, 6), torch.ones(20, 5), torch.ones(20), torch.ones(20)]
    assert PRODUCTS["_cudnn_rnn"]((torch.ones(4, 3, 6), weights), None) == 4 * 3 * (20 * 6 + 20 * 5)
