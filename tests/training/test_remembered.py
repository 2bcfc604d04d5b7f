"""A remembered network answers as the network does, and computes once."""

import torch

from kcrprune.training.evaluate import Remembered, evaluate
from kcrprune.training.images.batches import in_order


def test_a_remembered_network_computes_once_and_agrees_with_itself():
    images = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.arange(10) % 3)
    calls = []

    def network(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x.flatten(1)[:, :3]

    remembered = Remembered(network)
    batches = in_order(data, 4)
    first = evaluate(remembered, batches)
    second = evaluate(network, batches, reference=remembered.rewind_())
    assert calls == [4, 4, 2, 4, 4, 2]
    assert first.top1 == second.top1
    assert second.agreement == 1.0
