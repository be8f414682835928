"""Text-to-image training from top to bottom: check, load, cache, train, keep, export.

What optimiser step s sees is a function of the config and s alone (see samples.py), so a run that
stops after k steps and goes on is the run that never stopped. Does not answer for: the mathematics
(diffusion/), one step (engine.py), what a run is made of (run.py), its state (resume.py).
"""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from tqdm import tqdm

from latentdiff.config import Config
from latentdiff.evaluation.heldout import summarise, triple_losses
from latentdiff.training.components import check_parts
from latentdiff.training.export import averaged, export
from latentdiff.training.log import Window
from latentdiff.training.preview import write_sheet
from latentdiff.training.resume import first_checkpoint, resume, save_state
from latentdiff.training.run import Run, prepare, start_accelerator
from latentdiff.training.run_folder import RunLock, StopSignals, die_with_parent
from latentdiff.training.supply import Supply, step_batches

logger = logging.getLogger(__name__)


def train(config: Config) -> int:
    """Train as the config says; return the exit status: 0 done, 143 or 130 stopped by a signal.

    Writes config.yaml, metrics.jsonl, checkpoints/, samples/, tensorboard/ and, at the end,
    pipeline/ into config.output_dir. ValueError or FileNotFoundError says what is wrong with the
    input, before heavy work; FloatingPointError when the numbers go wrong.
    """
    die_with_parent()
    check_parts(config)
    accelerator = start_accelerator(config)
    folder = Path(config.output_dir).expanduser()
    with StopSignals() as signals, _lock(folder, accelerator):
        start = first_checkpoint(config, folder)
        run = prepare(config, folder, accelerator, start=start)
        first_step = resume(run, start)
        _say_plan(run, first_step)
        stopped = _train_steps(run, signals, first_step=first_step)
        run.saver.wait()
        if failure := run.saver.check():
            raise OSError(f"the last checkpoint could not be saved: {failure}") from failure
        if not stopped:
            export(run)
        run.log.close()
        return signals.exit_code if stopped else 0


def _train_steps(run: Run, signals: StopSignals, *, first_step: int) -> bool:
    """Train from first_step to the end; return whether a signal stopped it, its state saved."""
    config, settings, accelerator = run.config, run.config.train, run.accelerator
    num_samples, ids = len(run.supply.train), run.supply.train.ids
    batches = step_batches(
        config, run.supply, run.layout, first_step=first_step, accelerator=accelerator
    )
    timed = _Timed(batches)
    window = Window(accelerator, max_bad_steps=settings.max_bad_steps)
    bar = tqdm(
        initial=first_step,
        total=settings.max_steps,
        unit="step",
        disable=None if accelerator.is_main_process else True,
    )
    for step in range(first_step, settings.max_steps):
        count = run.layout.count(step, num_samples)
        result = run.engine.step(
            timed, step=step, count=count, accumulation=run.layout.accumulation
        )
        done = step + 1
        window.add(result, num_samples=count, waited=timed.take())
        bar.update()
        last = done == settings.max_steps
        stop = _any_process(signals.received is not None, accelerator) and not last
        if done % settings.log_every_steps == 0 or last or stop:
            rate = run.engine.rates.at(step - run.engine.skipped)
            figures, skipped = window.close(done, ids, rate=rate)
            run.engine.skipped += skipped
            run.log.write(done, figures)
            bar.set_postfix(
                loss=f"{figures['loss']:.4f}", img_s=f"{figures['images_per_second']:.1f}"
            )
        if stop or last or done % settings.checkpoint_every_steps == 0:
            save_state(run, done)
        if stop:
            bar.close()
            return True
        _look(run, done, last=last)
    bar.close()
    return False


def _look(run: Run, done: int, *, last: bool) -> None:
    """Measure the held-out loss and draw a sheet when it is time, with the EMA weights."""
    preview = run.config.preview
    measure = run.supply.triples is not None and _is_time(done, preview.held_out_every_steps, last)
    draw = _is_time(done, preview.every_steps, last)
    if not measure and not draw:
        return
    model = run.engine.model.eval()
    with averaged(run.engine):
        if measure:
            _measure(run, done)
        if draw:
            prompts = preview.prompts or _default_prompts(run.supply)
            write_sheet(
                run.components,
                prompts,
                run.folder / "samples" / f"step-{done:09d}.png",
                accelerator=run.accelerator,
                seed=run.config.train.seed,
                num_steps=preview.num_steps,
                guidance_scale=preview.guidance_scale,
            )
    model.train()


def _measure(run: Run, done: int) -> None:
    """Log the held-out loss and what captions are worth."""
    triples, objective = run.supply.triples, run.engine.objective
    assert triples is not None

    def denoise(zt: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        with run.accelerator.autocast():
            return run.engine.model(zt, t, text)

    if run.accelerator.is_main_process:
        losses = triple_losses(
            denoise,
            objective.schedule,
            triples,
            prediction_type=objective.prediction_type,
            batch_size=run.layout.micro_batch_size,
            device=run.accelerator.device,
        )
        num = objective.schedule.num_timesteps
        run.log.write(done, summarise(losses, triples.t, num_timesteps=num))
    run.accelerator.wait_for_everyone()


def _say_plan(run: Run, first_step: int) -> None:
    """Print what is about to happen, before the first step."""
    if not run.accelerator.is_main_process:
        return
    settings, layout, num = run.config.train, run.layout, len(run.supply.train)
    trained = sum(p.numel() for p in run.engine.parameters.values())
    per_epoch = layout.steps_per_epoch(num)
    logger.info(
        "%s: %s training and %s held-out pictures of %d px; %.1f M parameters trained in %s on %s",
        run.folder,
        f"{num:,}",
        f"{len(run.supply.held_out):,}",
        run.config.data.resolution,
        trained / 1e6,
        settings.precision,
        run.accelerator.device,
    )
    logger.info(
        "steps %d to %d, %d pictures each (%d processes x %d x %d accumulated), %d steps an epoch, "
        "%.1f epochs; rate %.2g %s after %d warm-up steps",
        first_step,
        settings.max_steps,
        settings.batch_size,
        layout.num_processes,
        layout.micro_batch_size,
        layout.accumulation,
        per_epoch,
        settings.max_steps / per_epoch,
        settings.learning_rate,
        settings.lr_schedule,
        settings.warmup_steps,
    )
    if not len(run.supply.held_out):
        logger.warning("no picture is held out, so no held-out loss; set data.split_fraction")


def _default_prompts(supply: Supply) -> list[str]:
    """Return eight captions, held out where there are any, spread over the folder."""
    folder = supply.held_out if len(supply.held_out) else supply.train
    chosen = [len(folder) * k // 8 for k in range(min(8, len(folder)))]
    return [folder[index].captions[0] for index in chosen]


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process raised its flag; a CPU message, so no device waits."""
    if accelerator.num_processes == 1:
        return flag
    raised = torch.tensor([int(flag)])
    torch.distributed.all_reduce(raised)
    return bool(raised.item())


def _is_time(done: int, every_steps: int, last: bool) -> bool:
    return last or (every_steps > 0 and done % every_steps == 0)


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
