"""Keeping a run's state and taking it back: which checkpoint, whose run, what is saved.

The held-out loss of a step is measured before its checkpoint is saved, and a step with the least
loss so far is saved whatever the cadence. So a checkpoint knows all losses up to its own, and the
best one is on the disk; where its save failed, the best of those that are there is kept.
What a checkpoint is on disk is checkpoint.py's business.
"""

import logging
from pathlib import Path
from typing import Any

import psutil

from latentdiff.config.io import flat, load_config
from latentdiff.config.text_to_image import Config
from latentdiff.training.checkpoint import (
    config_hash,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
    snapshot,
)
from latentdiff.training.fsdp import full_state, shard_state
from latentdiff.training.optim.ema import COUNT
from latentdiff.training.optim.posthoc_ema import (
    Snapshot,
    drop_snapshots_after,
    save_snapshot,
    snapshot_path,
)
from latentdiff.training.setup import Run

logger = logging.getLogger(__name__)

SPARE_MEMORY = 0.7  # share of the free memory that a copy of the state may take
MUTABLE_KEYS = (  # by a resumed run, without another result up to where it was
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
    "train.keep_",
    "train.export",
    "train.posthoc_ema_every_steps",
    "train.max_skipped_steps",
    "preview.",
    "eval.",
)


def first_checkpoint(config: Config, folder: Path) -> Path | None:
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
    if not (folder / "config.yaml").is_file():
        return
    before: Config = load_config(folder / "config.yaml")
    old, new = run_key(before), run_key(config)
    differing = [f"{k}: {old[k]} -> {new[k]}" for k in new if old.get(k) != new[k]]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); set them back, or "
            "choose another --output_dir"
        )


def resume(run: Run, start: Path | None) -> int:
    """Load a checkpoint; return the first step that is still to be done.

    Losses on another number of held-out triples are no measure for this run's and are forgotten.
    """
    step = 0
    if start is not None:
        checkpoint = load_checkpoint(start)
        step, state = checkpoint.step, _with_current_keys(checkpoint.state)
        if state.get("base") != run.base_hash:
            raise ValueError(
                f"{start} was trained on other weights than model.pretrained="
                f"{run.config.model.pretrained} holds now, which its own are added to; give the "
                "base model of that run"
            )
        run.train_step.load(shard_state(checkpoint.tensors, run.train_step.parameters), state)
        if state.get("num_heldout") == _num_heldout(run):
            run.heldout = {int(at): loss for at, loss in state["heldout"].items()}
        logger.info("going on after step %d from %s", step, start)
    if run.accelerator.is_main_process:
        drop_snapshots_after(run.folder, step)
    return step


def _with_current_keys(state: dict[str, Any]) -> dict[str, Any]:
    """Rename what checkpoints of earlier versions call otherwise."""
    return {name.replace("held_out", "heldout"): value for name, value in state.items()}


def save_state(run: Run, done: int) -> None:
    """Start a checkpoint, beside training where a copy fits into memory.

    Says so when the one before it failed.
    """
    is_main = run.accelerator.is_main_process
    tensors = full_state(run.train_step.tensors(), keep=is_main)
    if not is_main:
        return
    run.saver.wait()
    if failure := run.saver.check():
        logger.error("a checkpoint could not be saved (%s); older ones are kept", failure)
    state = run.train_step.state()
    size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    beside = size < SPARE_MEMORY * psutil.virtual_memory().available
    if beside:
        tensors = snapshot(tensors)
    root, settings = run.folder / "checkpoints", run.config.train
    losses = dict(run.heldout)
    state["heldout"] = {str(at): loss for at, loss in losses.items()}
    state["num_heldout"] = _num_heldout(run)
    state["scaling_factor"] = float(run.components.vae.config["scaling_factor"])
    state["base"] = run.base_hash
    settings_of_run, world = run_key(run.config), run.accelerator.num_processes

    def save() -> None:
        save_checkpoint(
            root,
            step=done,
            tensors=tensors,
            state=state,
            config_hash=config_hash(settings_of_run),
            world_size=world,
        )
        prune_checkpoints(
            root,
            keep_last=settings.keep_checkpoints,
            keep_every_steps=settings.keep_every_steps or None,
            losses=losses if settings.keep_best else None,
        )

    run.saver.submit(save)
    if not beside:
        run.saver.wait()


def save_posthoc_snapshots(run: Run, done: int) -> None:
    """Write a snapshot of each power-function average, one at a time; training waits.

    Call it before the step's checkpoint is saved: a run that goes on from there does not come by
    here again. Says so when the disk does not take one, and goes on.
    """
    is_main = run.accelerator.is_main_process
    for width, average in run.train_step.posthoc_emas.items():
        whole = full_state({"average": average.state_dict()}, keep=is_main)["average"]
        if not is_main:
            continue
        tensors = {name: whole[name].cpu() for name in average.tensors}
        stored = Snapshot(int(whole[COUNT]), average.gamma, tensors)
        try:
            save_snapshot(stored, snapshot_path(run.folder, done, width))
        except OSError as error:
            logger.error("a snapshot for scripts/reconstruct_ema.py is missing: %s", error)


def _num_heldout(run: Run) -> int:
    return 0 if run.train_data.heldout_triples is None else len(run.train_data.heldout_triples)


def run_key(config: Config) -> dict[str, object]:
    """Return the settings that make a run what it is."""
    return {k: v for k, v in flat(config).items() if not k.startswith(MUTABLE_KEYS)}
