"""Text-to-image training from top to bottom: check, load, cache, train, keep, export.

Optimiser step s is a function of the config and s alone (see samples.py), so a run that stops after
k steps and goes on is the run that never stopped. Does not answer for: the mathematics (diffusion/),
one step (engine.py), what a checkpoint is (checkpoint.py).
"""

import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from latentdiff.config import Config, flat, to_yaml
from latentdiff.evaluation.heldout import summarise, triple_losses
from latentdiff.latents import LatentCodec
from latentdiff.models import Components, schedule_of
from latentdiff.pipeline.facts import Facts, write_facts
from latentdiff.training.checkpoint import (
    BackgroundSaver,
    config_hash,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
    snapshot,
)
from latentdiff.training.components import (
    TextToImage,
    check_parts,
    learns_text,
    load_frozen_vae,
    new_components,
    pretrained_components,
    use_plain_attention,
)
from latentdiff.training.engine import Engine, Objective, RatePlan
from latentdiff.training.log import MetricsLog, Window
from latentdiff.training.preview import make_pipeline, write_sheet
from latentdiff.training.run_folder import RunLock, StopSignals, die_with_parent
from latentdiff.training.samples import Layout
from latentdiff.training.supply import (
    Supply,
    cache_latents,
    fit_scaling,
    make_supply,
    read_data,
    step_batches,
)

logger = logging.getLogger(__name__)

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
FREE_TO_CHANGE = (  # by a resumed run, without another result up to where it was
    "output_dir",
    "data.cache_dir",
    "data.num_workers",
    "train.max_steps",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.channels_last",
    "train.resume",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "preview.",
)


@dataclass
class Run:
    """Everything a run holds while it trains."""

    config: Config
    folder: Path
    accelerator: Accelerator
    components: Components
    supply: Supply
    engine: Engine
    layout: Layout
    log: MetricsLog
    saver: BackgroundSaver


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
        start = _first_checkpoint(config, folder)
        run = _prepare(config, folder, accelerator, start=start)
        first_step = _resume(run, start)
        _say_plan(run, first_step)
        stopped = _train_steps(run, signals, first_step=first_step)
        run.saver.wait()
        if failure := run.saver.check():
            raise OSError(f"the last checkpoint could not be saved: {failure}") from failure
        if not stopped:
            _export(run)
        run.log.close()
        return signals.exit_code if stopped else 0


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate; ValueError when it does not see the processes that were launched."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said, so that several CPU processes are seen
        mixed_precision=MIXED[config.train.precision],
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)] if backend else None,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched and Accelerate sees {accelerator.num_processes}, "
            f"as {accelerator.distributed_type}: they would train copies. On the CPU use "
            "torchrun --nproc_per_node N scripts/train_t2i.py"
        )
    return accelerator


def _prepare(config: Config, folder: Path, accelerator: Accelerator, *, start: Path | None) -> Run:
    """Read the data, load or build the model, encode what the caches lack, wrap for training."""
    train_data, held_out = read_data(config.data)
    trains_text = learns_text(config)
    if accelerator.is_main_process:
        _write(folder / "config.yaml", to_yaml(config))
    if config.model.pretrained:
        components = pretrained_components(config)
        latents = cache_latents(train_data, components.vae, config.data, accelerator=accelerator)
    else:
        vae = load_frozen_vae(config)
        latents = cache_latents(train_data, vae, config.data, accelerator=accelerator)
        if config.model.measure_latents:
            fit_scaling(vae, latents)
        captions = [caption for record in train_data for caption in record.captions]
        with accelerator.main_process_first():
            components = new_components(
                config, vae, captions=captions, tokenizer_dir=folder / "tokenizer"
            )
    supply = make_supply(
        config,
        train_data,
        held_out,
        components=components,
        latents=latents,
        learns_text=trains_text,
        accelerator=accelerator,
    )
    layout = Layout.of(
        config.train.batch_size, config.train.micro_batch_size, accelerator.num_processes
    )
    engine = make_engine(config, components, supply, accelerator)
    is_main = accelerator.is_main_process
    first_step = int(start.name.removeprefix("step-")) if start else 0
    log = MetricsLog(folder, is_main=is_main, first_step=first_step)
    return Run(
        config, folder, accelerator, components, supply, engine, layout, log, BackgroundSaver()
    )


def make_engine(
    config: Config, components: Components, supply: Supply, accelerator: Accelerator
) -> Engine:
    """Freeze what does not learn, lay out the rest, and build the engine around it."""
    settings, diffusion = config.train, config.diffusion
    for part in (components.vae, components.text_encoder):
        part.requires_grad_(False).eval()
    components.text_encoder.to(accelerator.device)
    model = TextToImage(components, learns_text=learns_text(config))
    model.requires_grad_(True).train()
    if settings.channels_last:
        components.unet.to(memory_format=torch.channels_last)
    if accelerator.device.type == "cpu":
        cells = config.data.resolution // LatentCodec(components.vae).factor
        use_plain_attention(components.unet, num_cells=cells**2)
    if settings.gradient_checkpointing:
        components.unet.enable_gradient_checkpointing()
        if model.text_encoder is not None:
            model.text_encoder.gradient_checkpointing_enable()
    device = accelerator.device
    objective = Objective(
        schedule_of(components.scheduler).to(device, dtype=torch.float32),
        prediction_type=components.scheduler.config["prediction_type"],
        null_text=supply.null_text.to(device),
        weighting=diffusion.weighting,
        weighting_gamma=diffusion.weighting_gamma,
        timesteps=diffusion.timesteps,
        offset_noise=diffusion.offset_noise,
        batch_size=settings.batch_size,
    )
    rates = RatePlan(
        base=settings.learning_rate,
        text_base=settings.text_learning_rate or settings.learning_rate,
        schedule=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
    )
    return Engine(
        model.to(device),
        objective=objective,
        accelerator=accelerator,
        rates=rates,
        weight_decay=settings.weight_decay,
        betas=(0.9, settings.beta2),
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay if settings.ema else None,
        fp16=settings.precision == "fp16",
        seed=settings.seed,
    )


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
            _save(run, done)
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
    with _averaged(run.engine):
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


def _save(run: Run, done: int) -> None:
    """Start a checkpoint beside training; say so when the one before it failed."""
    if not run.accelerator.is_main_process:
        return
    run.saver.wait()
    if failure := run.saver.check():
        logger.error("a checkpoint could not be saved (%s); older ones are kept", failure)
    tensors, state = snapshot(run.engine.tensors()), run.engine.state()
    root, settings = run.folder / "checkpoints", run.config.train
    state["scaling_factor"] = float(run.components.vae.config["scaling_factor"])
    identity, world = _identity(run.config), run.accelerator.num_processes

    def save() -> None:
        save_checkpoint(
            root,
            step=done,
            tensors=tensors,
            state=state,
            config_hash=config_hash(identity),
            world_size=world,
        )
        prune_checkpoints(root, keep_last=settings.keep_checkpoints)

    run.saver.submit(save)


def _first_checkpoint(config: Config, folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None to start; refuse a folder of another run."""
    root = folder / "checkpoints"
    if config.train.resume not in ("auto", "never"):
        path = Path(config.train.resume).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"train.resume={path} does not exist, expected a checkpoint")
        return path
    found, skipped = newest_valid(root)
    for reason in skipped:
        logger.warning("checkpoint skipped: %s", reason)
    if found is None:
        return None
    if config.train.resume == "never":
        raise ValueError(
            f"{folder} already holds a run ({found.name}); --train.resume=auto continues it, "
            "another --output_dir starts a new one"
        )
    _refuse_other_config(config, folder)
    return found


def _refuse_other_config(config: Config, folder: Path) -> None:
    """Raise ValueError with what differs when the folder's run had other settings."""
    from latentdiff.config import load_config

    if not (folder / "config.yaml").is_file():
        return
    before: Config = load_config(folder / "config.yaml")
    old, new = _identity(before), _identity(config)
    differing = [f"{k}: {old[k]} -> {new[k]}" for k in new if old.get(k) != new[k]]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); set them back, or "
            "choose another --output_dir"
        )


def _resume(run: Run, start: Path | None) -> int:
    """Load a checkpoint; return the first step that is still to be done."""
    if start is None:
        return 0
    checkpoint = load_checkpoint(start)
    run.engine.load(checkpoint.tensors, checkpoint.state)
    logger.info("going on after step %d from %s", checkpoint.step, start)
    return checkpoint.step


def _export(run: Run) -> None:
    """Write pipeline/: the model with EMA weights, in Stable Diffusion's format."""
    if run.accelerator.is_main_process:
        final, temporary = run.folder / "pipeline", run.folder / ".pipeline.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        with _averaged(run.engine):
            run.components.unet.to(memory_format=torch.contiguous_format)
            pipeline = make_pipeline(run.components)
            pipeline.facts = _facts(run)
            pipeline.save_pretrained(temporary)
        write_facts(temporary, _facts(run))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    run.accelerator.wait_for_everyone()


def _facts(run: Run) -> Facts:
    config = run.config
    last = {}
    for line in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    shown = ("held_out_loss", "held_out_se", "num_held_out", "caption_use")
    return Facts(
        caption_dropout=config.diffusion.caption_dropout,
        prediction_type=run.engine.objective.prediction_type,
        base_model=config.model.pretrained or None,
        dataset=Path(config.data.root).name,
        steps=config.train.max_steps,
        resolution=config.data.resolution,
        metrics={name: last[name] for name in shown if name in last},
    )


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


def _identity(config: Config) -> dict[str, object]:
    """Return the settings that make a run what it is."""
    return {k: v for k, v in flat(config).items() if not k.startswith(FREE_TO_CHANGE)}


def _any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process raised its flag; a CPU message, so no device waits."""
    if accelerator.num_processes == 1:
        return flag
    raised = torch.tensor([int(flag)])
    torch.distributed.all_reduce(raised)
    return bool(raised.item())


def _is_time(done: int, every_steps: int, last: bool) -> bool:
    return last or (every_steps > 0 and done % every_steps == 0)


def _averaged(engine: Engine):  # type: ignore[no-untyped-def]
    from contextlib import nullcontext

    return nullcontext() if engine.ema is None else engine.ema.swapped_in(engine.model)


def _lock(folder: Path, accelerator: Accelerator):  # type: ignore[no-untyped-def]
    from contextlib import nullcontext

    return RunLock(folder) if accelerator.is_main_process else nullcontext()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class _Timed:
    """An iterator that knows how long it was waited for, in seconds."""

    def __init__(self, batches: object) -> None:
        self._batches, self._waited = iter(batches), 0.0  # type: ignore[call-overload]

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
