"""The stage that measures the dense network, and how any network of a run is measured."""

from collections.abc import Sequence
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from kcrprune import processes
from kcrprune.measure.report import Accuracy, KernelFigures
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.run.context import Context
from kcrprune.run.describe import accuracy_of, kernel_figures
from kcrprune.run.opening import Network, Pool
from kcrprune.run.store import Result
from kcrprune.training.evaluate import Predict, Remembered, evaluate
from kcrprune.training.features import feature_covariance
from kcrprune.training.portions import Portions


class Reference(Result):
    """The dense network's figures, its logits on the evaluation images by batch, and sums over its features."""

    kernel: KernelFigures
    accuracy: Accuracy | None
    logits: list[Tensor]
    products: Tensor  # F^T F (d, d)
    images: int

    def seen(self, device: torch.device) -> Covariance:
        """The covariance of the features, where the features of its users are."""
        return Covariance(self.products.to(device), self.images)

    def replayed(self, network: Network) -> Remembered:
        """The dense network, which need not run again on the evaluation images."""
        remembered = Remembered(network.dense)
        remembered.logits = [processes.own(batch) for batch in self.logits]
        return remembered


def measure_dense(context: Context, network: Network, pool: Pool) -> Reference:
    """What the pruned network will be compared with."""
    with context.part("measure dense"):
        portions = Portions("measure dense", context.device, context.listener)
        dense = Remembered(network.dense, portions)
        accuracy = accuracy_on(context, network, pool, dense)  # first: an image that cannot be read ends the run
        covariance = portions.of_batches(pool.parts.calibration, partial(feature_covariance, network.dense))
        kernel = kernel_figures(covariance, context.settings.kernel_rank)
    return Reference(
        kernel=kernel, accuracy=accuracy, logits=dense.whole(), products=covariance.total, images=covariance.images
    )


def accuracy_on(
    context: Context, network: Network, pool: Pool, model: Predict, reference: Predict | None = None
) -> Accuracy | None:
    """How a network does on the evaluation images; None where there are none."""
    if pool.parts.evaluation is None:
        return None
    outputs, listener = network.outputs, context.listener
    return accuracy_of(evaluate(model, pool.parts.evaluation, outputs=outputs, reference=reference, listener=listener))


@torch.no_grad()
def plain_pass(context: Context, network: Network, batches: Sequence[Tensor]) -> float:
    """How long a forward pass of the dense network over batches of images takes, in seconds, by the first of them."""
    seconds = context.seconds_an_image
    if seconds is None:
        portions = Portions("load", context.device)
        seconds = context.seconds_an_image = portions.of(len(batches[0]), partial(_seconds, network.dense, batches[0]))
    return seconds * sum(map(len, batches))


def _seconds(model: nn.Module, batch: Tensor, at_once: int) -> float:
    """How long a pass takes for an image of a batch, of which so many are taken."""
    images, times = batch.split(at_once)[0].to(next(model.parameters()).device, non_blocking=True), []
    for _ in range(2):  # the first one warms up
        start = perf_counter()
        model(images).sum().item()  # a GPU is waited for
        times.append(perf_counter() - start)
    return times[-1] / at_once
