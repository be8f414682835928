"""The loop of every recipe, its files and signals: stop, evaluate, sample, save, step, log.

What optimiser step s sees is a function of the config, s and the state before it alone, so a run
that is stopped after k steps and resumed is the run that never stopped. Does not answer for: the
step of each recipe (text_to_image/, vae/, clip/), a run's state on disk (resume.py), the lock and
the signal handlers (run_folder.py, stop_signals.py).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from latentdiff.atomic import write_text
from latentdiff.config.io import flat, to_yaml
from latentdiff.data.folder.folder import Folder
from latentdiff.program import program
from latentdiff.training.bill.bill import Segment
from latentdiff.training.bill.folder_runs import gather_folder_materials
from latentdiff.training.bill.materials import Materials
from latentdiff.training.checkpoint import best_step, checkpoint_state
from latentdiff.training.distributed import any_process, machine_of, single_process_accelerator
from latentdiff.training.metrics_log import MetricsLog, Stopwatch, TimedIterator, log_throughput
from latentdiff.training.progress import Progress, lines_above_bar
from latentdiff.training.recipe import LoopSettings, Recipe
from latentdiff.training.resume import (
    CheckpointWriter,
    Start,
    begin_run,
    load_state,
    with_step_limit,
)
from latentdiff.training.run_folder import exports_of, open_run_folder
from latentdiff.training.run_log import begin_run_log
from latentdiff.training.stop_signals import StopSignals, die_with_parent
from latentdiff.training.trackers import Trackers, check_trackers

Settings = TypeVar("Settings")
logger = logging.getLogger(__name__)
NUM_UNTIMED, NUM_TIMED = 3, 10  # steps until caches are warm, and after


def train_recipe(
    recipe: Recipe,
    config: Any,
    settings: LoopSettings,
    folder: Path,
    *,
    accelerator: Accelerator,
    start: Start,
) -> int:
    """Train from where `begin_run` says; export, and return the exit status.

    0: done; 143 or 130: stopped by SIGTERM or SIGINT, its state saved. Writes config.yaml,
    metrics.jsonl, tensorboard/ and checkpoints/ into the run's folder. OSError when the last
    checkpoint could not be saved.
    """
    is_main = accelerator.is_main_process
    if is_main and settings.lr_warmup_steps > settings.max_steps:
        logger.warning(
            "the learning rate never reaches its peak: lr_warmup_steps=%d is above max_steps=%d",
            *(settings.lr_warmup_steps, settings.max_steps),
        )
    if is_main and start.step >= settings.max_steps:
        logger.info(
            "already trained to step %d: max_steps above that trains on; exporting again",
            start.step,
        )
    with lines_above_bar(), StopSignals(announces=is_main) as signals:
        if is_main:
            write_text(folder / "config.yaml", to_yaml(config))
            begin_run_log()
        # Before the state: a loader may draw from torch's generator, which is part of it.
        batches = TimedIterator(recipe.batches(start.step))
        load_state(recipe, start)
        trackers = None
        if is_main:
            trackers = Trackers(
                settings.report_to,
                folder,
                project=settings.tracker_project_name,
                settings=flat(config),
                first_step=start.step,
            )
        log = MetricsLog(folder, is_main=is_main, first_step=start.step, trackers=trackers)
        checkpoints = CheckpointWriter(folder, settings, config, accelerator, start.lineage)
        loop = Loop(recipe, settings, accelerator, log, checkpoints, signals)
        try:
            stopped = loop.train_steps(batches, first_step=start.step)
        finally:
            checkpoints.wait()
        checkpoints.raise_error()
        if not stopped:
            recipe.export()
        log.close()
        if is_main:
            _log_end(recipe, folder, stopped=stopped)
        return signals.exit_code if stopped else 0


def _log_end(recipe: Recipe, folder: Path, *, stopped: bool) -> None:
    """Log what a run has written, and what to type next."""
    if stopped:
        logger.info("stopped, its state saved in %s: the same command continues", folder)
        return
    sheets = sorted(folder.glob("samples/*.png"))
    named = {"before": sheets[:1], "after": sheets[1:][-1:]}
    written = [f"{path}" for path in exports_of(folder)]
    written += [f"{name}: {path}" for name, paths in named.items() for path in paths]
    logger.info("written:%s", "".join(f"\n  {line}" for line in written))
    if commands := recipe.next_commands():
        lines = (f"\n  {program()} {command}" for command in commands)
        logger.info("next:%s", "".join(lines))


@dataclass
class Loop:
    """A recipe in training, with the run's log, checkpoints and signals."""

    recipe: Recipe
    settings: LoopSettings
    accelerator: Accelerator
    log: MetricsLog
    checkpoints: CheckpointWriter
    signals: StopSignals

    def train_steps(self, batches: TimedIterator, *, first_step: int) -> bool:
        """Train from first_step to the end; return whether a signal stopped it, its state saved.

        A round begins where `step` optimiser steps are done: it logs, evaluates, samples and saves
        their state and then takes the next step, but for the last of the max_steps + 1 rounds.
        """
        recipe, settings = self.recipe, self.settings
        watch = Stopwatch(self.accelerator.device)
        progress = Progress(
            first_step,
            settings.max_steps,
            steps_per_epoch=recipe.steps_per_epoch,
            is_main=self.accelerator.is_main_process,
        )
        for step in range(first_step, settings.max_steps + 1):
            is_new, last = step > first_step, step == settings.max_steps
            stop = any_process(self.signals.received is not None, self.accelerator) and not last
            if is_new and is_due(step, settings.log_every_steps, last):
                self._log_steps(step, watch, progress)
            if stop:  # what is not logged yet is in the checkpoint
                if is_new:
                    self.checkpoints.save(recipe, step)
                break
            if step == first_step + 1:
                watch.total_paused = 0.0  # what comes before the first step comes once
            with watch.paused():
                is_best = self._evaluate(step, progress, last=last)
                last = last or (recipe.verdicts is not None and recipe.verdicts.ends)
                self.log.write(step, self._save_samples(step, last=last))
            if is_best or (is_new and is_due(step, settings.checkpoint_every_steps, last)):
                self.checkpoints.save(recipe, step)
            if last:
                break
            num_images = recipe.step(batches, step)
            watch.add(num_images, waited=batches.take())
            progress.advance()
        progress.close()
        return stop

    def _log_steps(self, step: int, watch: Stopwatch, progress: Progress) -> None:
        """Log the figures of the steps since the last line, and once how long the rest takes."""
        figures = self.recipe.figures(step)  # waits for the device
        seconds = watch.seconds()
        figures |= watch.close()
        self.log.write(step, figures)
        self.checkpoints.log_error()
        if watch.num_closed == 1 and self.accelerator.is_main_process:
            num_images = (self.settings.max_steps - step) * self.settings.batch_size
            log_throughput(figures["images_per_second"], num_images=num_images)
        progress.show(step, figures, seconds=seconds, paused=watch.total_paused)

    def _save_samples(self, step: int, *, last: bool) -> dict[str, float]:
        """Write a sheet where one is due; whatever prevents it is no reason to stop training."""
        sheet = self.log.folder / "samples" / f"step-{step:09d}.png"
        try:
            is_new = not sheet.exists()
            figures = self.recipe.save_samples(step, last=last)
            if is_new and sheet.exists():
                self.log.write_sheet(step, sheet)
            return figures
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("no sheet of images for step %d, training continues: %s", step, reason)
            return {}

    def _evaluate(self, step: int, progress: Progress, *, last: bool) -> bool:
        """Evaluate where no checkpoint has it; return whether this is the best state to keep."""
        heldout, verdicts = self.recipe.heldout, self.recipe.verdicts
        if step in heldout or (verdicts is not None and step <= verdicts.rule.last_step):
            return False
        figures = self.recipe.evaluate(step, last=last)
        is_judged = verdicts is not None and verdicts.rule.last_step == step
        self.log.write(step, {**figures, **(verdicts.figures() if verdicts and is_judged else {})})
        if math.isfinite(loss := figures.get("heldout_loss", math.nan)):
            before = max(heldout.items(), default=None)
            heldout[step] = loss
            progress.show_heldout(step, loss, before=before)
        if verdicts is not None and verdicts.verdict is not None and is_judged:
            progress.show_verdict(verdicts.verdict, verdicts.measure)
            if self.accelerator.is_main_process:
                verdicts.log_stop(self.settings.max_steps)
        ranking = self.recipe.ranking()
        return self.settings.keep_best and step in ranking and best_step(ranking) == step


def train_in_one_process(
    config: Settings, build: Callable[..., Recipe], *, folders: Sequence[Folder] = ()
) -> int:
    """Train a recipe that knows no second process; return the exit status, as `train_recipe`.

    build: makes it of a config, the run's folder and the accelerator; folders: of its images, for
    the bill of materials. The config, of a VAE or a CLIP, may limit the run in minutes: timing a
    few steps turns that into max_steps, once.
    """
    die_with_parent()
    given: Any = config
    accelerator = single_process_accelerator(given.mixed_precision)
    check_trackers(given.report_to, is_main=True)
    with open_run_folder(given.output_dir, accelerator) as folder:

        def count_steps() -> int:
            recipe = build(config, folder, accelerator)
            return steps_within(given.max_minutes, recipe, max_steps=given.max_steps)

        limited = with_step_limit(
            config, folder, minutes=given.max_minutes, steps_within=count_steps
        )
        start = begin_run(limited, folder, accelerator)
        recipe, settings = build(limited, folder, accelerator), LoopSettings.of(limited)
        recipe.materials = _materials(limited, folders, accelerator=accelerator, start=start)
        return train_recipe(recipe, limited, settings, folder, accelerator=accelerator, start=start)


def _materials(
    config: Any, folders: Sequence[Folder], *, accelerator: Accelerator, start: Start
) -> Materials | None:
    """Return the hashes of what a VAE or a CLIP is made of; None where none are wanted, or with a
    warning where that fails, which is no reason not to train.
    """
    if not folders or config.bill_of_materials == "none":
        return None
    state = checkpoint_state(start.checkpoint) if start.checkpoint is not None else {}
    try:
        return gather_folder_materials(
            config,
            folders,
            machine=machine_of(accelerator, micro_batch_size=config.batch_size),
            recorded=[Segment(**one) for one in state.get("materials") or ()],
            from_step=start.step,
            trains=start.step < config.max_steps,
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("no bill of materials is written, training continues: %s", reason)
        return None


def steps_within(minutes: float, recipe: Recipe, *, max_steps: int) -> int:
    """Return how many steps take so many minutes, at most max_steps, by timing a few of them.

    The recipe is spoilt by it. Timed are the last steps of a run, which count every loss.
    """
    began = started = time.perf_counter()
    batches = recipe.batches(0)
    for k in range(NUM_UNTIMED + NUM_TIMED):
        if k == NUM_UNTIMED:
            recipe.figures(max_steps)  # waits for the device
            started = time.perf_counter()
        recipe.step(batches, max_steps - 1)
    recipe.figures(max_steps)
    now = time.perf_counter()
    left = 60 * minutes - (now - began)
    return max(1, min(max_steps, int(left / ((now - started) / NUM_TIMED))))


def is_due(step: int, every_steps: int, last: bool) -> bool:
    """Return whether something comes after `step` steps: every so many (0: never), and at last."""
    return last or (every_steps > 0 and step % every_steps == 0)
