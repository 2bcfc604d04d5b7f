"""The stage that measures the dense network, and how any network of a run is measured."""

import torch
from torch import Tensor

from kcrprune.measure.report import Accuracy, KernelFigures
from kcrprune.method.kernel_complexity import Covariance
from kcrprune.run.context import Context
from kcrprune.run.describe import accuracy_of, class_count, kernel_figures
from kcrprune.run.opening import Network, Pool
from kcrprune.run.store import Result
from kcrprune.training.evaluate import Predict, Remembered, evaluate
from kcrprune.training.features import feature_covariance


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
        remembered.logits = list(self.logits)
        return remembered


def measure_dense(context: Context, network: Network, pool: Pool) -> Reference:
    """What the pruned network will be compared with."""
    with context.part("measure dense"):
        dense = Remembered(network.dense)
        accuracy = accuracy_on(context, network, pool, dense)  # first: an image that cannot be read ends the run
        covariance = feature_covariance(network.dense, pool.parts.calibration)
        kernel = kernel_figures(covariance, context.settings.kernel_rank)
    return Reference(
        kernel=kernel, accuracy=accuracy, logits=dense.logits, products=covariance.total, images=covariance.images
    )


def accuracy_on(
    context: Context, network: Network, pool: Pool, model: Predict, reference: Predict | None = None
) -> Accuracy | None:
    """How a network does on the evaluation images; None where there are none, or no classes."""
    if pool.parts.evaluation is None or class_count(network.dense) == 0:
        return None
    return accuracy_of(evaluate(model, pool.parts.evaluation, reference=reference, listener=context.listener))
