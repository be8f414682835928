"""A run's state on disk, of any recipe: which checkpoint, whose run, what is saved and kept.

The held-out loss of a step is measured before its checkpoint is saved, and a step with the minimum
loss so far is saved whatever the cadence. So a checkpoint knows all losses up to its own, and the
best one is on the disk; where its save failed, the best of those that are there is kept.
How a checkpoint lies on the disk is checkpoint.py's business.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from accelerate import Accelerator

from latentdiff.config.io import flat, load_config
from latentdiff.training.checkpoint import (
    BackgroundSaver,
    config_hash,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
    snapshot,
)
from latentdiff.training.fsdp import full_state
from latentdiff.training.recipe import LoopSettings, Recipe

logger = logging.getLogger(__name__)
Settings = TypeVar("Settings")

SPARE_MEMORY = 0.7  # share of the free memory that a copy of the state may take
MUTABLE_KEYS = (  # by a resumed run, without another result up to where it was
    "output_dir",
    "data.cache_dir",
    "data.num_workers",
    "finetune.lora_kohya",
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
    # of the VAE and CLIP recipes, whose learning rate depends on max_steps
    "features",
    "save_dtype",
    "num_workers",
    "resume",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_",
)


def first_checkpoint(config: Any, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, None to start; refuse a folder of another run."""
    settings = flat(config)
    key = "resume" if "resume" in settings else "train.resume"
    if settings[key] not in ("auto", "never"):
        path = Path(settings[key]).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{key}={path} does not exist, expected a checkpoint")
        return path
    found, skipped = newest_valid(folder / "checkpoints")
    for reason in skipped:
        logger.warning("checkpoint skipped: %s", reason)
    if found is None:
        return None
    if settings[key] == "never":
        raise ValueError(
            f"{folder} already holds a run ({found.name}); --{key}=auto continues it, "
            "another --output_dir starts a new one"
        )
    before = _config_of(folder, type(config))
    old, new = run_key(before or config), run_key(config)
    differing = [f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}); set them back, or "
            "choose another --output_dir"
        )
    return found


def with_step_limit(
    config: Settings, folder: Path, *, minutes: float, steps_within: Callable[[], int]
) -> Settings:
    """Return a config whose limit in minutes has become one in steps, once for a run.

    So no learning rate depends on the clock. A folder that holds the run already has its max_steps;
    else steps_within times them. The config has max_steps and max_minutes.
    """
    if not minutes:
        return config
    before = _config_of(folder, type(config))
    if before is not None:
        known: Settings = _limited(config, flat(before)["max_steps"])
        if run_key(known) == run_key(before):
            return known
    limited = _limited(config, steps_within())
    logger.info("max_minutes=%g become max_steps=%d", minutes, flat(limited)["max_steps"])
    return limited


def load_state(recipe: Recipe, start: Path | None) -> None:
    """Give a recipe the state of a checkpoint."""
    if start is None:
        return
    checkpoint = load_checkpoint(start)
    recipe.load(checkpoint.tensors, checkpoint.state)
    logger.info("resumed after step %d from %s", checkpoint.step, start)


class CheckpointWriter:
    """Saves a run's state, next to training where a copy fits into memory, and deletes old ones."""

    def __init__(
        self,
        folder: Path,
        settings: LoopSettings,
        key: dict[str, object],
        accelerator: Accelerator,
    ) -> None:
        """key: the settings that make the run what it is (`run_key`)."""
        self.root, self.settings, self.accelerator = folder / "checkpoints", settings, accelerator
        self.config_hash = config_hash(key)
        self._saver = BackgroundSaver()

    def save(self, recipe: Recipe, step: int) -> None:
        """Start a checkpoint of the state after `step` steps; log it when the one before failed.

        Every process must call it; the main one writes.
        """
        is_main = self.accelerator.is_main_process
        tensors = full_state(recipe.tensors(), keep=is_main)
        if not is_main:
            return
        self._saver.wait()
        self.log_error()
        state, losses = recipe.state(), dict(recipe.heldout)
        size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        fits = size < SPARE_MEMORY * psutil.virtual_memory().available
        if fits:
            tensors = snapshot(tensors)

        def save() -> None:
            save_checkpoint(
                self.root,
                step=step,
                tensors=tensors,
                state=state,
                config_hash=self.config_hash,
                world_size=self.accelerator.num_processes,
            )
            prune_checkpoints(
                self.root,
                keep_last=self.settings.keep_checkpoints,
                keep_every_steps=self.settings.keep_every_steps or None,
                losses=losses if self.settings.keep_best else None,
            )

        self._saver.submit(save)
        if not fits:
            self._saver.wait()

    def log_error(self) -> None:
        """Log that a save failed, as soon as it is known; training continues."""
        if not self._saver.busy and (failure := self._saver.check()):
            logger.error("a checkpoint could not be saved (%s); older ones are kept", failure)

    def wait(self) -> None:
        """Return when no save is under way."""
        self._saver.wait()

    def raise_error(self) -> None:
        """Raise OSError when the last save failed."""
        if failure := self._saver.check():
            raise OSError(f"the last checkpoint could not be saved: {failure}") from failure


def run_key(config: Any) -> dict[str, object]:
    """Return the settings that make a run what it is."""
    return {k: v for k, v in flat(config).items() if not k.startswith(MUTABLE_KEYS)}


def _config_of(folder: Path, kind: type[Settings]) -> Settings | None:
    """Return the config of the folder's run, None where there is none."""
    path = folder / "config.yaml"
    return load_config(path, kind=kind) if path.is_file() else None


def _limited(config: Settings, max_steps: int) -> Settings:
    changed: Any = config
    limited: Settings = dataclasses.replace(changed, max_steps=max_steps, max_minutes=0.0)
    return limited
