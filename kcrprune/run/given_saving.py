"""The last stages of a run on a network in memory: its part measured, the network saved and reported."""

from typing import Final

import torch

from kcrprune.artifact.artifact import DTYPES, MODEL_FILE, rounded_
from kcrprune.artifact.given import Origin, save_given
from kcrprune.families import Given
from kcrprune.measure.macs import count_parameters
from kcrprune.measure.report import Accuracy, Comparison, KernelFigures, ModelReport, block_widths
from kcrprune.method.objective import relative_distances
from kcrprune.plan import ChannelPlan
from kcrprune.run.context import FREE, PLACES, Context
from kcrprune.run.cutting import Cut, Recovery
from kcrprune.run.describe import kernel_figures
from kcrprune.run.folder import STORE
from kcrprune.run.given import InMemory, part_macs
from kcrprune.run.measuring import Reference
from kcrprune.run.opening import Pool
from kcrprune.run.pricing import Times
from kcrprune.run.saving import write_results
from kcrprune.run.store import Result
from kcrprune.surgery.narrow import keep_all
from kcrprune.training.features import feature_covariance

LAYOUT: Final = "a module in memory"


class GivenFigures(Result):
    """The pruned network's figures: its kernel's, and by output the relative squared distance to the dense one."""

    kernel: KernelFigures
    distances: dict[str, float]
    images: int
    macs: int


@torch.no_grad()
def measure_given(
    context: Context, network: InMemory, pool: Pool, reference: Reference, cut: Cut, recovery: Recovery | None
) -> GivenFigures:
    """The same figures as of the dense network, and how far each output is from its own on the images that decide."""
    model = final(network, cut, recovery, context)
    with context.part("measure pruned"):
        covariance = feature_covariance(model, pool.parts.calibration)
        kernel = kernel_figures(covariance, context.settings.kernel_rank)
        sums, images = dict.fromkeys(network.given.scales, 0.0), 0
        for feed, _ in pool.parts.held_out:
            moved = feed.to(context.device)
            own, wanted = model.outputs(moved), network.given.outputs(moved)
            for name, value in own.items():
                sums[name] += float(relative_distances(value.float(), wanted[name].float()).sum())
            images += len(feed)
    distances = {name: total / images for name, total in sums.items()}
    macs = part_macs(model, network.feed)
    assert macs == network.cost.predicted(cut.plan), "predicted and counted MACs differ"
    for name, distance in distances.items():
        context.say(f"{name}: relative squared distance {distance:.4g} on the {images:,} images that decide")
    context.record.decisions["distances"] = distances
    return GivenFigures(kernel=kernel, distances=distances, images=images, macs=macs)


def final(network: InMemory, cut: Cut, recovery: Recovery | None, context: Context) -> Given:
    """The network that a run ends with, its weights rounded to what they are stored in."""
    model = network.pruned(cut.plan, recovery.weights if recovery else cut.weights)
    assert isinstance(model, Given)
    rounded_(model, DTYPES[context.settings.dtype])
    return model


def save_run(
    context: Context,
    network: InMemory,
    pool: Pool,
    times: Times | None,
    reference: Reference,
    cut: Cut,
    recovery: Recovery | None,
    found: GivenFigures,
) -> Comparison:
    """Writes the files of the run, its record last."""
    folder, config = context.folder, context.settings
    assert folder is not None, "a run that saves has a folder"
    origin = Origin(network.name, network.given.use.part, cut.plan)
    with context.part("save"):
        model, fresh = final(network, cut, recovery, context), folder / STORE / MODEL_FILE
        fresh.unlink(missing_ok=True)
        save_given(fresh, model.inside, origin, dtype=DTYPES[config.dtype])
        fresh.replace(folder / MODEL_FILE)
    told = context.told()
    size = (folder / MODEL_FILE).stat().st_size
    distance = sum(found.distances.values()) / len(found.distances)
    comparison = Comparison(
        before=_report(network, network.given, None, reference.kernel, network.cost.dense, None),
        after=_report(
            network, model, cut.plan, found.kernel, found.macs, Accuracy(images=found.images, distance=distance), size
        ),
        stages=tuple(told.times),
        settings=config.model_dump(mode="json", exclude_defaults=True, exclude={*FREE, *PLACES}),
        notes=tuple(told.notes),
    )
    write_results(
        context, cut.plan, comparison, config, told, {"input": {"class": network.name, "sha256": network.digest}}
    )
    return comparison


def _report(
    network: InMemory,
    model: Given,
    plan: ChannelPlan | None,
    kernel: KernelFigures,
    macs: int,
    accuracy: Accuracy | None,
    file_bytes: int = 0,
) -> ModelReport:
    """Figures of the part."""
    whole = ChannelPlan(architecture=None, groups=tuple(keep_all(g) for g in network.groups if g.axis != "heads"))
    return ModelReport(
        source=model.use.part or network.name,
        layout=LAYOUT,
        state="pruned" if plan else "dense",
        architecture=network.name,
        family=None,
        input_size=network.input_size,
        outputs=network.outputs,
        parameters=count_parameters(model.get_submodule(model.use.part)),
        macs=network.an_image(macs),
        dense_macs=network.an_image(network.cost.dense),
        file_bytes=file_bytes,
        blocks=block_widths(plan or whole),
        kernel=kernel,
        accuracy=accuracy,
    )
