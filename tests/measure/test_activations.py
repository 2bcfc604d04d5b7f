import torch
from torch import nn

from kcrprune.measure.activations import peak_activation_bytes


class Wide(nn.Module):
    """(B, 10) to (B, 10) over a wide middle, which is `kept` until the end or not."""

    def __init__(self, width, *, kept=False):
        super().__init__()
        self.into, self.out, self.kept = nn.Linear(10, width), nn.Linear(width, 10), kept

    def forward(self, x):
        middle = self.into(x).view(1, -1)  # a view takes nothing
        active = torch.relu(middle)
        if not self.kept:
            del middle
        return self.out(active) + self.out(torch.relu(active))


def test_the_peak_is_what_lives_at_once():
    image, streams = 40, 80  # both results, the second one while its input lives
    assert peak_activation_bytes(Wide(1000), (10,)) == image + 8000 + streams
    assert peak_activation_bytes(Wide(1000, kept=True), (10,)) == image + 12000 + streams
    assert peak_activation_bytes(Wide(400), (10,)) == image + 3200 + streams


def test_what_is_made_in_place_takes_nothing():
    network = nn.Sequential(nn.Linear(10, 50), nn.ReLU(inplace=True), nn.Linear(50, 2))
    assert peak_activation_bytes(network, (10,)) == 40 + 200 + 8
