"""The text-to-image recipe from top to bottom: check, load, cache, train, evaluate, sample, export.

Does not answer for: the mathematics (diffusion/), the loop (loop.py), one step (train_step.py), how
a run is set up (setup.py).
"""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from latentdiff.config.data import DataConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder
from latentdiff.models.unet.learned_variance import prediction_only
from latentdiff.training.bill.bill import Segment
from latentdiff.training.bill.materials import Materials, gather_materials
from latentdiff.training.checkpoint import Parts, checkpoint_state
from latentdiff.training.distributed import any_process, machine_of, start_accelerator
from latentdiff.training.finetune.initial_weights import open_initial_file
from latentdiff.training.fsdp import full_state, make_root, shard_state
from latentdiff.training.inputs.canaries import with_canaries
from latentdiff.training.inputs.conditions import FixedCondition
from latentdiff.training.inputs.randomness import RULE_BY_PLACE, STRATA_RULE
from latentdiff.training.inputs.train_data import TrainData
from latentdiff.training.inputs.workers import report_worker_crash
from latentdiff.training.loop import is_due, train_recipe
from latentdiff.training.optim.ema import COUNT
from latentdiff.training.optim.optimizer import estimates
from latentdiff.training.optim.posthoc_ema import (
    Snapshot,
    drop_snapshots_after,
    save_snapshot,
    snapshot_path,
)
from latentdiff.training.recipe import LoopSettings, Recipe
from latentdiff.training.resume import Start, begin_run
from latentdiff.training.run_folder import open_run_folder
from latentdiff.training.stop_signals import die_with_parent
from latentdiff.training.stopping.heldout import heldout_losses
from latentdiff.training.stopping.sample_costs import Measured, sample_costs
from latentdiff.training.stopping.verdicts import RunVerdicts
from latentdiff.training.text_to_image.components import check_components
from latentdiff.training.text_to_image.export import averaged, export
from latentdiff.training.text_to_image.memory import fitting_layout, usable_memory
from latentdiff.training.text_to_image.memory_modes import check_layout
from latentdiff.training.text_to_image.plan import log_plan
from latentdiff.training.text_to_image.preview import (
    check_prompts,
    check_vae,
    image_guidance_scale,
    write_sheet,
)
from latentdiff.training.text_to_image.resolution import with_resolution
from latentdiff.training.text_to_image.setup import (
    Run,
    setup,
    with_epochs_as_steps,
)
from latentdiff.training.text_to_image.step_results import StepResults
from latentdiff.training.trackers import check_trackers

MIN_PROMPTS = 4  # of the sheets' default prompts
Z_95 = 1.96  # standard errors of a 95 % interval
NUM_LOOKED_AT = 64  # captions that the sheets' default prompts are chosen from

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train as the config says; return the exit status: 0 done, 143 or 130 stopped by a signal.

    Writes config.yaml, metrics.jsonl, checkpoints/, samples/, tensorboard/ and, at the end,
    pipeline/ into config.output_dir. ValueError or FileNotFoundError says what is wrong with the
    input, before heavy work; FloatingPointError when the numbers go wrong; DeadWorkerError names
    the sample that a dead data worker was reading. A signal before the first step ends the process
    at once: nothing is lost by it.
    """
    die_with_parent()
    config = with_resolution(config)
    check_components(config)
    check_prompts(config.preview.prompts)
    check_vae(config.preview.vae, source=config.model.pretrained or config.model.vae)
    open_initial_file(config.finetune)
    accelerator = start_accelerator(config)
    check_trackers(config.train.report_to, is_main=accelerator.is_main_process)
    with open_run_folder(config.output_dir, accelerator) as folder:
        config = with_epochs_as_steps(config, accelerator)
        start = begin_run(config, folder, accelerator)
        rule = strata_rule_of(start.checkpoint)
        run = setup(with_canaries(config, accelerator), folder, accelerator)
        run.strata_rule = rule
        run.layout = fitting_layout(run, available=usable_memory(accelerator.device))
        check_layout(config.train, run.layout)
        log_plan(run, start.step)
        if accelerator.is_main_process:
            drop_snapshots_after(folder, start.step)
            run.materials = materials_of(config, run, start)
        with report_worker_crash(run.train_data.dataset, run.train_data.ids):
            return train_recipe(
                TextToImageRecipe(run),
                config,
                LoopSettings.of(config.train),
                folder,
                accelerator=accelerator,
                start=start,
            )


def materials_of(config: Config, run: Run, start: Start) -> Materials | None:
    """Return the hashes of what a run is made of, but for canaries, which the config makes.

    None where data.bill_of_materials=none, or with a warning where that fails, which is no reason
    not to train.
    """
    if config.data.bill_of_materials == "none":
        return None
    recorded = None
    facts = machine_of(run.accelerator, micro_batch_size=run.layout.micro_batch_size)
    if start.checkpoint is not None:
        recorded = checkpoint_state(start.checkpoint).get("materials")
    try:
        return gather_materials(
            config,
            dict(islice(run.sources.items(), len(config.data.each_source()))),
            machine=facts,
            class_images=run.class_images,
            recorded=[Segment(**one) for one in recorded or ()],
            from_step=start.step,
            trains=start.step < config.train.max_steps,
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("no bill of materials is written, training continues: %s", reason)
        return None


def strata_rule_of(start: Path | None) -> int:
    """Return the rule of a run's strata (`step_strata`): that of the checkpoint it starts from.

    None: a new run. ValueError for a rule that this version does not know.
    """
    if start is None:
        return STRATA_RULE
    rule = checkpoint_state(start).get("strata_rule", RULE_BY_PLACE)
    if rule not in (RULE_BY_PLACE, STRATA_RULE):
        raise ValueError(
            f"checkpoint {start}: its run assigns timesteps by rule {rule}, expected "
            f"{RULE_BY_PLACE} or {STRATA_RULE}; continue it with the version that began it"
        )
    return int(rule)


class TextToImageRecipe(Recipe):
    """Text-to-image training: a U-Net, and a text encoder where it is trained along."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run, self.train_step = run, run.train_step
        self._uses_condition = False
        self.steps_per_epoch = run.train_data.order.steps_per_epoch
        self.results = StepResults(
            run.accelerator,
            max_skipped_steps=run.config.train.max_skipped_steps,
            num_timesteps=self.train_step.objective.schedule.num_timesteps,
        )
        self.samples = sample_costs(run, self._prompts()) if run.config.eval.num_samples else None
        by_loss = self._num_heldout > 1  # triples, for an interval
        if not run.config.distill.is_on and (by_loss or self.samples):
            self.verdicts = RunVerdicts(
                "held-out loss" if by_loss else "unlikeness to the subject",
                ends_run=run.config.train.stop == "auto",
                warmup_steps=run.config.train.lr_warmup_steps,
            )

    def batches(self, first_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's micro-batches."""
        run = self.run
        return run.train_data.batches(
            run.layout,
            first_step=first_step,
            last_step=run.config.train.max_steps,
            accelerator=run.accelerator,
            seed=run.config.train.seed,
            strata_rule=run.strata_rule,
        )

    def step(self, batches: Iterator[dict[str, torch.Tensor]], step: int) -> int:
        """Do optimiser step `step`, and write the post-hoc averages when they are due."""
        count = self.run.train_data.order.count(step)
        result = self.train_step.step(
            batches, step=step, count=count, accumulation=self.run.layout.accumulation
        )
        self.results.add(result)
        settings, done = self.run.config.train, step + 1
        if is_due(done, settings.posthoc_ema_every_steps, done == settings.max_steps):
            self._save_posthoc_snapshots(done)
        return count

    def figures(self, step: int) -> dict[str, float]:
        """Return mean losses, and count the skipped updates, which hold the learning rate back."""
        rate = self.train_step.lr_schedule.at(step - 1 - self.train_step.skipped)
        figures, skipped = self.results.close(step, self.run.train_data.ids, learning_rate=rate)
        self.train_step.skipped += skipped
        return figures | estimates(self.train_step.optimizer)

    def evaluate(self, step: int, *, last: bool) -> dict[str, float]:
        """Measure what there is to measure when it is due, with the EMA weights, and judge it.

        All processes share in it. A student has no figures: it does not learn from noised images.
        """
        run, found, costs = self.run, Measured(), list[float]()
        figures: dict[str, float] = {}
        if run.config.distill.is_on or not is_due(step, run.config.eval.every_steps, last):
            return figures
        with self._eval_mode():
            if self._num_heldout:
                figures, costs = heldout_losses(run)
                self._log_condition_use(step, figures)
            if self.samples is not None:
                found = self.samples.measure(run, self._conditions())
        if self.verdicts is not None and self.verdicts.measure == "held-out loss":
            self.verdicts.add(step, costs)
        elif self.verdicts is not None:
            self.verdicts.add(step, found.costs, drift=found.drift)
        return figures | found.figures

    def _log_condition_use(self, step: int, figures: Mapping[str, float]) -> None:
        """Log once that the model has begun to use its image condition."""
        use = figures.get("condition_use", 0.0)
        half = Z_95 * figures.get("condition_use_se", float("inf"))
        if use <= half or self._uses_condition:
            return
        self._uses_condition = True
        if self.run.accelerator.is_main_process:
            logger.info(
                "step %d: the image condition saves %.1f %% of the held-out loss (95 %% interval "
                "+- %.1f): the model begins to use it",
                *(step, 100 * use, 100 * half),
            )

    def save_samples(self, step: int, *, last: bool) -> dict[str, float]:
        """Write a sheet of images when it is due and not there yet, with the EMA weights.

        The first one comes before the first step: what the model makes without training.
        """
        run, preview = self.run, self.run.config.preview
        path = run.folder / "samples" / f"step-{step:09d}.png"
        if step and not is_due(step, preview.every_steps, last):
            return {}
        if not any_process(not path.exists(), run.accelerator):
            return {}  # made before the run was stopped
        with self._eval_mode():
            return write_sheet(
                run.preview_components or run.components,
                self._prompts(),
                path,
                accelerator=run.accelerator,
                seed=run.config.train.seed,
                num_steps=preview.num_steps,
                guidance_scale=preview.guidance_scale,
                image_guidance=image_guidance_scale(run.config),
                prompt_weighting=bool(preview.prompts),  # typed; captions are taken verbatim
                nearest_images=run.nearest_images,
                conditions=self._conditions(),
                condition_kind=run.config.condition_kind,
                condition_vae=run.components.vae,
                controlnet=run.controlnet,
            )

    def _prompts(self) -> Sequence[str]:
        if typed := self.run.config.preview.prompts:
            return typed
        fixed = self.run.train_data.preview_conditions
        return [one.caption for one in fixed] or default_prompts(self.run.train_data)

    def _conditions(self) -> list[FixedCondition]:
        """Return a condition for each of the sheets' prompts, if the model reads any."""
        fixed = self.run.train_data.preview_conditions
        return [fixed[k % len(fixed)] for k in range(len(self._prompts()))] if fixed else []

    def _save_posthoc_snapshots(self, step: int) -> None:
        """Write a snapshot of each post-hoc average, one at a time; training waits.

        Comes before the step's checkpoint is saved: a run that is resumed from there does not come
        by here again. A disk that does not take one is logged, and training continues.
        """
        is_main = self.run.accelerator.is_main_process
        for sigma_rel, average in self.train_step.posthoc_emas.items():
            whole = full_state({"average": average.state_dict()}, keep=is_main)["average"]
            if not is_main:
                continue
            tensors = {name: whole[name].cpu() for name in average.tensors}
            stored = Snapshot(int(whole[COUNT]), average.gamma, tensors)
            try:
                save_snapshot(stored, snapshot_path(self.run.folder, step, sigma_rel))
            except OSError as error:
                logger.error("a snapshot for latentdiff export ema is missing: %s", error)

    def tensors(self) -> Parts:
        """Return weights, optimiser state, averages, and the steps since the last log line."""
        return {**self.train_step.tensors(), **self.results.tensors()}

    def state(self) -> dict[str, Any]:
        """Return the numbers next to them, and the held-out losses so far."""
        materials = self.run.materials
        return self.train_step.state() | {
            "heldout": {str(step): loss for step, loss in self.heldout.items()},
            "num_heldout": self._num_heldout,
            "verdicts": self.verdicts and self.verdicts.to_json(),
            "samples": self.samples and self.samples.to_json(),
            "skipped_in_a_row": self.results.skipped_in_a_row,
            "scaling_factor": float(self.run.components.vae.config["scaling_factor"]),
            "base": self.run.base_hash,
            "strata_rule": self.run.strata_rule,
            "materials": materials.to_json() if materials else None,
        }

    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take them back; losses of another number of held-out triples are forgotten."""
        state = {name.replace("held_out", "heldout"): value for name, value in state.items()}
        if state.get("base") != self.run.base_hash:
            raise ValueError(
                "the checkpoint was trained on other weights than model.pretrained="
                f"{self.run.config.model.pretrained} and the files that finetune names hold now, "
                "which its own are added to; give those of that run"
            )
        self.train_step.load(shard_state(tensors, self.train_step.parameters), state)
        self.results.load(tensors, skipped_in_a_row=state.get("skipped_in_a_row", 0))
        is_same = state.get("num_heldout") == self._num_heldout
        if self.samples is not None:
            is_same &= self.samples.load(state.get("samples")) or bool(self._num_heldout)
        if self.verdicts is not None and is_same:
            self.verdicts.load(state.get("verdicts"))
        if is_same:
            self.heldout |= {int(step): loss for step, loss in state["heldout"].items()}

    def export(self) -> None:
        """Write pipeline/."""
        export(self.run, self.ranking(), example_prompts=self._prompts())

    def ranking(self) -> dict[int, float]:
        """Return the held-out losses by step, or the order of the verdicts' best ones."""
        if self.verdicts is not None and self.verdicts.ends_run:
            return self.verdicts.rule.ranking()
        return super().ranking()

    def next_commands(self) -> list[str]:
        """Return how to make images with the model, in a file or in the browser, and to measure it.

        The prompt is the first of the run's sheets. None where no process had the whole weights.
        """
        run, folder = self.run, self.run.folder
        if run.config.condition_kind != "none":
            return [f"report {shlex.quote(str(folder))}"]
        if not (folder / "pipeline").is_dir():
            return []
        data = run.config.data.each_source()[0]
        pipeline, root = shlex.quote(f"{folder / 'pipeline'}"), shlex.quote(data.root)
        out = shlex.quote(f"{folder / 'evaluation'}")
        evaluate = f"evaluate {pipeline} --data {root} --out {out}"
        for name in ("heldout_fraction", "caption_column"):  # other values make another split
            if (value := getattr(data, name)) != getattr(DataConfig, name):
                evaluate += f" --{name} {shlex.quote(str(value))}"
        return [
            f"sample {pipeline} {shlex.quote(self._prompts()[0])} --out sheet.png",
            f"app {pipeline}",
            f"report {shlex.quote(str(folder))}",
            *([evaluate] if len(run.train_data.heldout) else []),
        ]

    @property
    def _num_heldout(self) -> int:
        triples = self.run.train_data.heldout_triples
        return 0 if triples is None else len(triples)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Give the model its EMA weights and evaluation mode inside the block.

        A learned variance is skipped: the prediction alone is measured and sampled.
        """
        make_root(self.train_step.wrapped)
        model = self.train_step.model.eval()
        try:
            with averaged(self.train_step), prediction_only(self.run.components):
                yield
        finally:
            model.train()


def default_prompts(train_data: TrainData) -> list[str]:
    """Return up to eight different captions, held-out ones if there are any.

    Where fewer than four are held out, those of training images make them up to four.
    """
    prompts = _distinct_captions(train_data, train_data.heldout, 8)
    if len(prompts) >= MIN_PROMPTS:
        return prompts
    num = MIN_PROMPTS + len(prompts) if prompts else 8
    own = _distinct_captions(train_data, train_data.train, num)
    return list(dict.fromkeys(prompts + own))[: MIN_PROMPTS if prompts else 8]


def _distinct_captions(train_data: TrainData, folder: Folder, num: int) -> list[str]:
    """Return up to `num` different captions, evenly over the folder."""
    if not len(folder):
        return []
    looked_at = min(NUM_LOOKED_AT, len(folder))
    indices = [len(folder) * k // looked_at for k in range(looked_at)]
    captions = (train_data.transform.first(folder[index]) for index in indices)
    distinct = list(dict.fromkeys(captions))
    num = min(num, len(distinct))
    return [distinct[len(distinct) * k // num] for k in range(num)]
