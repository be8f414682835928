"""Text-to-image training from top to bottom: check, load, cache, train, keep, export.

What optimiser step s sees is a function of the config and s alone (see inputs/dataset.py), so a
run that is stopped after k steps and resumed is the run that never stopped. Does not answer for:
the mathematics (diffusion/), one step (train_step.py), what a run is made of (setup.py), its state
(resume.py).
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from tqdm import tqdm

from latentdiff.config.text_to_image import Config
from latentdiff.evaluation.metrics.heldout_loss import (
    summarize_gap,
    summarize_losses,
    triple_losses,
)
from latentdiff.training.checkpoint import best_step
from latentdiff.training.export import averaged, export
from latentdiff.training.fsdp import is_sharded
from latentdiff.training.inputs.train_data import TrainData
from latentdiff.training.inputs.workers import report_worker_crash
from latentdiff.training.learned_variance import prediction_only
from latentdiff.training.metrics_log import Window
from latentdiff.training.model import check_components
from latentdiff.training.plan import log_plan, log_throughput
from latentdiff.training.preview import write_sheet
from latentdiff.training.resume import first_checkpoint, resume, save_posthoc_snapshots, save_state
from latentdiff.training.run_folder import RunLock, StopSignals, die_with_parent
from latentdiff.training.setup import Run, setup, start_accelerator

NUM_LOOKED_AT = 64  # captions that the sheets' default prompts are chosen from

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train as the config says; return the exit status: 0 done, 143 or 130 stopped by a signal.

    Writes config.yaml, metrics.jsonl, checkpoints/, samples/, tensorboard/ and, at the end,
    pipeline/ into config.output_dir. ValueError or FileNotFoundError says what is wrong with the
    input, before heavy work; FloatingPointError when the numbers go wrong; DeadWorkerError names
    what a dead data worker was reading. A signal before the first step ends the process at once:
    nothing is lost by it.
    """
    die_with_parent()
    check_components(config)
    accelerator = start_accelerator(config)
    folder = Path(config.output_dir).expanduser()
    with _log_rank_on_error(accelerator), _lock(folder, accelerator):
        start = first_checkpoint(config, folder)
        run = setup(config, folder, accelerator, start=start)
        with (
            StopSignals() as signals,
            report_worker_crash(run.train_data.dataset, run.train_data.ids),
        ):
            first_step = resume(run, start)
            log_plan(run, first_step)
            try:
                stopped = _train_steps(run, signals, first_step=first_step)
            finally:
                run.saver.wait()
            if failure := run.saver.check():
                raise OSError(f"the last checkpoint could not be saved: {failure}") from failure
            if not stopped:
                _export(run)
            run.log.close()
            return signals.exit_code if stopped else 0


def _train_steps(run: Run, signals: StopSignals, *, first_step: int) -> bool:
    """Train from first_step to the end; return whether a signal stopped it, its state saved.

    A round begins where `step` optimiser steps are done: it logs, evaluates, samples and saves that
    state and then takes the next step, but for the last of the max_steps + 1 rounds.
    """
    settings, accelerator = run.config.train, run.accelerator
    batches = _Timed(
        run.train_data.batches(
            run.layout,
            first_step=first_step,
            last_step=settings.max_steps,
            accelerator=accelerator,
        )
    )
    window = Window(
        accelerator,
        max_skipped_steps=settings.max_skipped_steps,
        num_timesteps=run.train_step.objective.schedule.num_timesteps,
    )
    bar = tqdm(
        initial=first_step,
        total=settings.max_steps,
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    for step in range(first_step, settings.max_steps + 1):
        is_new, last = step > first_step, step == settings.max_steps
        stop = _any_process(signals.received is not None, accelerator) and not last
        if is_new and _is_due(step, settings.log_every_steps, last or stop):
            _log_window(run, window, step, bar=bar)
        if is_new and _is_due(step, settings.posthoc_ema_every_steps, last):
            save_posthoc_snapshots(run, step)
        if stop:
            if is_new:
                save_state(run, step)
            break
        with window.paused():
            is_best = _eval_heldout(run, step, last=last)
            _save_samples(run, step, last=last)
        if is_best or (is_new and _is_due(step, settings.checkpoint_every_steps, last)):
            save_state(run, step)
        if last:
            break
        count = run.train_data.order.count(step)
        result = run.train_step.step(
            batches, step=step, count=count, accumulation=run.layout.accumulation
        )
        window.add(result, num_samples=count, waited=batches.take())
        bar.update()
    bar.close()
    return stop


def _log_window(run: Run, window: Window, step: int, *, bar: tqdm) -> None:
    """Log the figures of the steps since the last line, and first how long the rest will take."""
    rate = run.train_step.lr_schedule.at(step - 1 - run.train_step.skipped)
    figures, skipped = window.close(step, run.train_data.ids, rate=rate)
    run.train_step.skipped += skipped
    run.log.write(step, figures)
    _log_save_error(run)
    if window.is_first and run.accelerator.is_main_process:
        settings = run.config.train
        num_images = (settings.max_steps - step) * settings.batch_size
        log_throughput(figures["images_per_second"], num_images=num_images)
    window.is_first = False
    bar.set_postfix(loss=f"{figures['loss']:.4f}", img_s=f"{figures['images_per_second']:.1f}")


def _save_samples(run: Run, done: int, *, last: bool) -> None:
    """Write a sheet of images when it is due and not there yet, with the EMA weights."""
    preview = run.config.preview
    if not done or not _is_due(done, preview.every_steps, last):
        return
    if not _any_process(not _sheet_path(run, done).exists(), run.accelerator):
        return  # made before the run was stopped
    with _evaluating(run):
        try:
            figures = write_sheet(
                run.components,
                preview.prompts or _default_prompts(run.train_data),
                _sheet_path(run, done),
                accelerator=run.accelerator,
                seed=run.config.train.seed,
                num_steps=preview.num_steps,
                guidance_scale=preview.guidance_scale,
                nearest_images=run.nearest_images,
            )
            if figures:
                run.log.write(done, figures)
        except OSError as error:  # a full disk, say, is no reason to stop training
            logger.error("no sheet for step %d: %s", done, error)


def _eval_heldout(run: Run, done: int, *, last: bool) -> bool:
    """Measure the held-out loss when it is due; return whether this state is the best to keep.

    What a checkpoint has already measured is not measured again. Next to it goes the loss of
    training images, whose gap to it tells overfitting. All processes share in it, with the EMA
    weights. The log also has what captions are worth.
    """
    triples, trained = run.train_data.heldout_triples, run.train_data.train_triples
    objective = run.train_step.objective
    is_due = done not in run.heldout and _is_due(done, run.config.eval.every_steps, last)
    if triples is None or trained is None or not is_due:
        return False

    def denoise(zt: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with run.accelerator.autocast():
            return run.train_step.model(zt, t, text)

    with _evaluating(run):
        measure = partial(
            triple_losses,
            denoise,
            objective.schedule,
            prediction_type=objective.prediction_type,
            device=run.accelerator.device,
            shard=(run.accelerator.process_index, run.accelerator.num_processes),
        )
        shares = measure(triples)
        trained_share = measure(trained, captions=["true"])
    losses = run.accelerator.reduce(shares, "sum")
    trained_losses = run.accelerator.reduce(trained_share, "sum")["true"]
    figures = summarize_losses(losses, triples.t, num_timesteps=objective.schedule.num_timesteps)
    figures |= summarize_gap(losses["true"][triples.order], trained_losses[trained.order])
    run.log.write(done, figures)
    if math.isfinite(loss := figures["heldout_loss"]):
        run.heldout[done] = loss
    saved = {step: loss for step, loss in run.heldout.items() if step}  # the start is not
    return run.config.train.keep_best and best_step(saved) == done


@contextmanager
def _evaluating(run: Run) -> Iterator[None]:
    """Give the model its EMA weights and evaluation mode inside the block.

    A learned variance is left out: what is measured and drawn is the prediction.
    """
    model = run.train_step.model.eval()
    with averaged(run.train_step), prediction_only(run.components):
        yield
    model.train()


def _export(run: Run) -> None:
    """Write pipeline/, unless no process has the whole weights."""
    if not is_sharded(run.train_step.parameters):
        export(run)
    elif run.accelerator.is_main_process:
        logger.warning(
            "the weights are spread over processes; the same command in one process, without FSDP, "
            "writes %s from the last checkpoint",
            run.folder / "pipeline",
        )


def _log_save_error(run: Run) -> None:
    """Say that a save beside training failed, as soon as it is known; training goes on."""
    if not run.saver.busy and (failure := run.saver.check()):
        logger.error("a checkpoint could not be saved (%s); older ones are kept", failure)


def _default_prompts(train_data: TrainData) -> list[str]:
    """Return up to eight captions that differ, held out where there are any, spread over them."""
    folder = train_data.heldout if len(train_data.heldout) else train_data.train
    looked_at = min(NUM_LOOKED_AT, len(folder))
    places = [len(folder) * k // looked_at for k in range(looked_at)]
    settled = (train_data.transform.fixed(folder[place].captions[0]) for place in places)
    distinct = list(dict.fromkeys(settled))
    num = min(8, len(distinct))
    return [distinct[len(distinct) * k // num] for k in range(num)]


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process raised its flag; a CPU message, so no device waits."""
    if accelerator.num_processes == 1:
        return flag
    raised = torch.tensor([int(flag)])
    torch.distributed.all_reduce(raised)
    return bool(raised.item())


def _sheet_path(run: Run, done: int) -> Path:
    return run.folder / "samples" / f"step-{done:09d}.png"


def _is_due(done: int, every_steps: int, last: bool) -> bool:
    return last or (every_steps > 0 and done % every_steps == 0)


@contextmanager
def _log_rank_on_error(accelerator: Accelerator) -> Iterator[None]:
    """Say which of several processes failed, since the others then fail for want of it."""
    try:
        yield
    except Exception as error:
        if accelerator.num_processes > 1:
            rank, num = accelerator.process_index, accelerator.num_processes
            logger.error("rank %d of %d processes failed: %s", rank, num, error)
        raise


def _lock(folder: Path, accelerator: Accelerator) -> AbstractContextManager[object]:
    return RunLock(folder) if accelerator.is_main_process else nullcontext()


class _Timed:
    """An iterator that knows how long it was waited for, in seconds."""

    def __init__(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        self._batches, self._waited = batches, 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        batch: dict[str, torch.Tensor] = next(self._batches)
        self._waited += time.perf_counter() - started
        return batch

    def take(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited
