"""One run, stage by stage: load, balance, score, search, cut, refit, recover, measure, save."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from kcrprune.artifact.artifact import open_model, save_model
from kcrprune.checkpoints.dense import Opened
from kcrprune.config import RunConfig
from kcrprune.errors import CheckpointError, ConfigError
from kcrprune.events import Listener, Note, StageEnded, StageStarted, StepDone
from kcrprune.measure.macs import count_macs, count_parameters
from kcrprune.measure.report import Accuracy, Comparison, KernelFigures, StageTime
from kcrprune.method.budget import Scores, predicted_macs, require_reachable, solve
from kcrprune.method.gates import Gates
from kcrprune.method.innovations import Innovations
from kcrprune.method.objective import Objective
from kcrprune.pipeline.runs import peak_memory_mib
from kcrprune.plan import ChannelPlan
from kcrprune.run.describe import accuracy_of, class_count, file_bytes, kernel_figures, report_of
from kcrprune.run.network import open_for_run, purse_of
from kcrprune.surgery.balance import balance_
from kcrprune.surgery.expanded import expand_
from kcrprune.surgery.gated import add_gates_, remove_gates_
from kcrprune.surgery.pruned import apply_plan_
from kcrprune.surgery.refit import refit_
from kcrprune.training.data import open_images
from kcrprune.training.evaluate import Predict, Remembered, evaluate
from kcrprune.training.innovations import innovations_of
from kcrprune.training.loop import HeldOut, endless, feature_covariance, make_objective, open_accelerator
from kcrprune.training.parts import divide, told_of_few
from kcrprune.training.reconstruct import Reconstruction
from kcrprune.training.recover import Recovered, recover_
from kcrprune.training.scores import equal_scores, fisher_scores, magnitude_scores, random_scores
from kcrprune.training.search import search_


@dataclass
class Run:
    """One run's state, filled from the first stage to the last."""

    config: RunConfig
    listener: Listener
    stages: list[StageTime] = field(default_factory=list)
    histories: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    innovations: dict[str, Innovations] = field(default_factory=dict)  # by linear; what gates act on

    def load(self, checkpoint: Path) -> None:
        """Opens the network and the images; refuses what cannot work."""
        config = self.config
        torch.manual_seed(config.seed)
        self.accelerator = open_accelerator(config.device, config.precision)
        self.opened = open_for_run(checkpoint, config)
        if self.opened.plan is not None:
            raise CheckpointError(f"{checkpoint} is pruned already; compress the dense checkpoint that it came from")
        self.dense = self.opened.model.to(self.accelerator.device)
        self.macs = count_macs(self.dense, self.opened.preprocessing.input_size)
        self.purse = purse_of(self.dense, self.macs, config)
        require_reachable(self.purse, config.target_flops)
        self.images = open_images(config, self.opened.preprocessing, class_count(self.dense))
        self._say(
            f"{self.opened.architecture.name} ({self.opened.layout}), {self.macs:,} MACs, {self.images.description}"
        )
        for name, reason in config.without_effect().items():
            self._say(f"{name} = {getattr(config, name)} does nothing in this run, since {reason}", True)
        if self.images.generated:
            self._say("no data was given: images are generated, and the task is to agree with the dense network", True)
        if file_bytes(self.opened.path) < 3 * count_parameters(self.dense):
            self._say("the checkpoint stores half precision and the run float32: compare parameters, not file sizes")
        if self.opened.new_head:
            self._train_head()
        self._objective()  # refuses a task that these images do not allow
        self.parts = divide(self.images, self.config)
        for sentence in told_of_few(self.parts, self.config):
            self._say(sentence)

    def _train_head(self) -> None:
        """Without a trained classifier the dense network has no answers to follow, so labels alone are the task."""
        if not self.images.labelled or self.config.task == "distill" or self.config.recover_steps == 0:
            raise ConfigError("the classifier is new, so it must be trained: give labelled images and recover_steps")
        if self.config.search_steps > 0 and self.config.search_weight_lr == 0:
            raise ConfigError(
                "the classifier is new, and a search that freezes it learns nothing: give search_weight_lr"
            )
        self.config = self.config.model_copy(update={"task": "labels"})

    def _objective(self) -> Objective:
        return make_objective(self.config, self.dense, labelled=self.images.labelled)

    def _say(self, text: str, warning: bool = False) -> None:  # noqa: FBT001, FBT002 (private, read at the call)
        self.notes.append(text)
        self.listener(Note(text, warning))

    def compress(self, path: Path, final_path: Path) -> Comparison:
        """Everything between the loaded network and the saved one."""
        config = self.config
        with self.stage("measure dense"):
            reference = Remembered(self.dense.eval())
            self.covariance = feature_covariance(self.dense, self.parts.calibration)
            kernel_before = kernel_figures(self.covariance, config.kernel_rank)
            accuracy_before = self._evaluate(reference, None)
        self.balanced = copy.deepcopy(self.dense)  # the same function; what refits are made towards
        if config.balance:
            with self.stage("balance"):
                balance_(self.balanced, self.purse.sites, self.parts.calibration)
        rotated = copy.deepcopy(self.balanced)
        scores = self._score(rotated)
        for number in range(1, config.tighten_steps):
            scores = self._tighten_(rotated, scores, config.target_flops ** (number / config.tighten_steps))
        candidates = {}
        if config.search_steps > 0:
            searched = copy.deepcopy(rotated)  # a search may train weights as well
            candidates["search"] = self._search(searched, scores), searched
        if config.ranked_by != "equal":  # equal scores are a start and no plan
            candidates["scores"] = scores, rotated
        self.innovations = {}  # large, and of no more use
        plan, pruned = self._cut(candidates)
        cut = self._recover(pruned)
        with self.stage("measure pruned"):
            kernel_after = kernel_figures(feature_covariance(pruned, self.parts.calibration), config.kernel_rank)
            accuracy_after = self._evaluate(pruned, reference.rewind_())
        assert count_macs(pruned, self.opened.preprocessing.input_size) == predicted_macs(
            self.macs, self.purse.sites, plan
        ), "predicted and counted MACs differ"
        with self.stage("save"):
            after = self._save(pruned, plan, path, kernel_after, accuracy_after)
        return Comparison(
            before=report_of(self.opened, kernel=kernel_before, accuracy=accuracy_before),
            after=report_of(after, kernel=kernel_after, accuracy=accuracy_after).model_copy(
                update={"source": str(final_path), "file_bytes": file_bytes(path)}
            ),
            cut=cut,
            stages=tuple(self.stages),
            settings=config.model_dump(mode="json", exclude_defaults=True),
            notes=tuple(self.notes),
        )

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Iterator[None]:
        """Announces a stage and takes its time."""
        self.listener(StageStarted(name, steps))
        start = perf_counter()
        yield
        seconds = perf_counter() - start
        self.stages.append(StageTime(stage=name, seconds=seconds, peak_memory_mib=peak_memory_mib()))
        self.listener(StageEnded(name, seconds))

    def _evaluate(self, model: Predict, reference: Predict | None) -> Accuracy | None:
        if self.parts.evaluation is None or class_count(self.dense) == 0:
            return None
        return accuracy_of(evaluate(model, self.parts.evaluation, reference=reference, listener=self.listener))

    def _gate_(self, model: nn.Module) -> Gates:
        config = self.config
        return add_gates_(
            model, config.axes, include=config.include, exclude=config.exclude, innovations=self.innovations
        )

    def _score(self, model: nn.Module) -> Scores:
        generator = torch.Generator().manual_seed(self.config.seed)
        ranking = self.config.ranked_by
        if ranking == "innovation":
            with self.stage("order"):
                self.innovations = innovations_of(
                    model, self.purse.open_axes, self.purse.sites, self.parts.scoring, generator
                )
        gates = self._gate_(model)
        with self.stage("score"):
            if ranking == "magnitude":
                scores = magnitude_scores(model, gates)
            elif ranking == "random":
                scores = random_scores(gates, generator)
            elif ranking == "equal":
                scores = equal_scores(gates)
            else:
                scores = fisher_scores(model, gates, self.parts.scoring, generator)
        remove_gates_(model, gates)
        if not any(score.any() for of_site in scores.values() for score in of_site.values()):
            raise CheckpointError(
                f"every score is zero: on {sum(map(len, self.parts.scoring)):,} images nothing that may be cut changes "
                "what the network answers; is its classifier trained?"
            )
        return scores

    def _tighten_(self, model: nn.Module, scores: Scores, share: float) -> Scores:
        """Cuts and refits to a share above the target, writes that back in dense shape, and scores what is left."""
        plan = solve(self.purse, scores, share, self.opened.architecture.name)
        pruned = apply_plan_(copy.deepcopy(model), plan)
        if self.config.refit:
            self._refit(pruned, plan, f"to {share:.2f}")
        expand_(model, pruned, self.purse.sites, plan)
        return self._score(model)

    def _search(self, model: nn.Module, scores: Scores) -> Scores:
        config = self.config
        gates = self._gate_(model)
        steps = config.search_steps if config.epochs is None else config.epochs * len(self.parts.gates)
        with self.stage("search", steps):
            found = search_(
                model,
                gates,
                scores,
                self.macs,
                self._objective(),
                config,
                self.accelerator,
                endless(self.parts.weights),
                endless(self.parts.gates),
                self.covariance,
                steps=steps,
                listener=self.listener,
            )
        remove_gates_(model, gates)
        self.histories["search"] = found.history
        return found.scores

    def _cut(self, candidates: dict[str, tuple[Scores, nn.Module]]) -> tuple[ChannelPlan, nn.Module]:
        """Cuts and refits each candidate by its scores; the one that stays closest to the dense network wins."""
        distance = make_objective(self.config.model_copy(update={"task": "distill"}), self.dense, labelled=False)
        measure = HeldOut(distance, self.parts.held_out, self.accelerator.device)
        uncorrected, losses, results = {}, {}, {}
        for name, (scores, uncut) in candidates.items():
            plan = solve(self.purse, scores, self.config.target_flops, self.opened.architecture.name)
            pruned = apply_plan_(copy.deepcopy(uncut), plan)
            if self.config.refit:
                uncorrected[name] = measure.loss(pruned)
                self._refit(pruned, plan, name)
            losses[name] = measure.loss(pruned)
            results[name] = plan, pruned
        best = min(losses, key=lambda name: losses[name])
        self.decisions["plans"] = {
            "ranking": self.config.ranked_by,
            "before_refit": uncorrected,
            "held_out_distillation": losses,
            "chosen": best,
        }
        if len(losses) > 1:
            figures = ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())
            self._say(f"held-out distance to the dense network by plan: {figures}; kept: {best}")
        return results[best]

    def _refit(self, pruned: nn.Module, plan: ChannelPlan, name: str) -> None:
        stage, config = f"refit ({name})", self.config
        generator = torch.Generator().manual_seed(config.seed)
        reconstruction = Reconstruction(config.reconstruct_epochs, config.reconstruct_lr, generator)
        with self.stage(stage, len(self.purse.sites)):
            refit_(
                pruned,
                self.balanced,
                self.purse.sites,
                plan,
                self.parts.calibration,
                ridge=config.refit_ridge,
                fit_block=reconstruction if config.reconstruct_epochs > 0 else None,
                on_block=lambda done: self.listener(StepDone(stage, done)),
            )

    def _recover(self, pruned: nn.Module) -> Accuracy | None:
        """Trains what the cut left; returns how good it was before, None where nothing is trained."""
        config = self.config
        if config.recover_steps == 0:
            return None
        with self.stage("measure cut"):
            cut = self._evaluate(pruned, None)
        if cut is not None and cut.top1 is not None:
            self._say(f"after cut and refit, before recovery: top-1 {100 * cut.top1:.2f} %")
        steps = config.recover_steps if config.epochs is None else config.epochs * len(self.parts.training)
        with self.stage("recover", steps):
            found = recover_(
                pruned,
                self._objective(),
                config,
                self.accelerator,
                endless(self.parts.training),
                self.parts.held_out,
                self.covariance,
                steps=steps,
                listener=self.listener,
            )
        self._remember(found)
        return cut

    def _remember(self, found: Recovered) -> None:
        self.histories["recover"] = found.history
        self.decisions["recover"] = {
            "held_out_before": found.loss_before,
            "held_out_after": found.loss_after,
            "kept_step": found.kept_step,
        }
        if found.kept_step == 0:
            self._say("recovery did not lower the held-out loss; the network before it was kept")

    def _save(
        self, pruned: nn.Module, plan: ChannelPlan, path: Path, kernel: KernelFigures, accuracy: Accuracy | None
    ) -> Opened:
        opened = self.opened
        record = {
            "config": self.config.model_dump(mode="json"),
            "dense_digest": opened.digest,
            "dense_macs": self.macs,
            "kernel": kernel.model_dump(mode="json"),
            "accuracy": accuracy and accuracy.model_dump(mode="json"),
        }
        save_model(
            path,
            pruned.cpu(),
            architecture=opened.architecture,
            plan=plan,
            preprocessing=opened.preprocessing,
            class_names=opened.class_names or self.images.class_names,
            record=record,
        )
        return open_model(path)
