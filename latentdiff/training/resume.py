"""A run's state on disk, of any recipe: which checkpoint, whose run, what is saved and kept.

A run continues from the newest valid checkpoint of its folder. A checkpoint given by its path
begins a branch: what the folder's run has after it is moved aside, and never deleted. Where no
checkpoint can be used a run is refused, and starts anew only when asked to.

The held-out loss of a step is measured before its checkpoint is saved, and a step with the minimum
loss so far is saved whatever the cadence. So a checkpoint knows all losses up to its own, and the
best one is on the disk; where its save failed, the best of those that are there is kept.
How a checkpoint lies on the disk is checkpoint.py's business.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
from accelerate import Accelerator

from latentdiff.config.io import flat, load_stored_config, to_yaml
from latentdiff.training.checkpoint import (
    CONFIG,
    BackgroundSaver,
    Lineage,
    branch_at,
    checkpoint_folders,
    checkpoint_step,
    config_hash,
    is_part_of,
    load_checkpoint,
    newest_valid,
    prune_checkpoints,
    read_lineage,
    save_checkpoint,
    snapshot,
    validate_checkpoint,
)
from latentdiff.training.fsdp import full_state
from latentdiff.training.recipe import LoopSettings, Recipe
from latentdiff.training.run_folder import (
    exports_of,
    has_leftovers,
    move_aside,
    move_run_aside,
    next_previous,
)

logger = logging.getLogger(__name__)
Settings = TypeVar("Settings")

SPARE_MEMORY = 0.7  # share of the free memory that a copy of the state may take
MUTABLE_KEYS = (  # by a resumed run, without another result up to where it was
    "output_dir",
    "data.cache_dir",
    "data.num_workers",
    "data.bill_of_materials",
    "finetune.lora_kohya",
    "train.max_steps",
    "train.max_epochs",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.channels_last",
    "train.resume",
    "train.log_every_steps",
    "train.report_to",
    "train.tracker_project_name",
    "train.checkpoint_every_steps",
    "train.keep_",
    "train.export",
    "train.stop",
    "train.posthoc_ema_every_steps",
    "train.max_skipped_steps",
    "preview.",
    "eval.",
    # of the VAE and CLIP recipes, whose learning rate depends on max_steps
    "bill_of_materials",
    "features",
    "save_dtype",
    "num_workers",
    "resume",
    "log_every_steps",
    "report_to",
    "tracker_project_name",
    "checkpoint_every_steps",
    "keep_",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins: after `step` steps, from a checkpoint (None: from nothing)."""

    checkpoint: Path | None = None
    step: int = 0
    lineage: Lineage = ()


def begin_run(config: Any, folder: Path, accelerator: Accelerator) -> Start:
    """Choose where the run begins, and move aside what the folder holds of another future.

    Every process must call it; ValueError as `first_checkpoint`, before anything is moved.
    """
    found, root = first_checkpoint(config, folder), folder / "checkpoints"
    is_run = _holds_run(folder)
    is_anew = found is None if is_run else _is_of_other_settings(config, folder)
    start, others = Start(), []
    if found is not None:
        branch = branch_at(found)
        if _is_same(found, _resume(config)):
            others = [path for path in checkpoint_folders(root) if not is_part_of(path, branch)]
        is_branch = others or not _is_in(found, root)
        start = Start(found, checkpoint_step(found), branch if is_branch else read_lineage(found))
    accelerator.wait_for_everyone()  # all have looked
    if accelerator.is_main_process and is_anew:
        move_run_aside(folder)
    if accelerator.is_main_process and others:
        move_aside(folder, after=start.step, checkpoints=others)
    return start


def first_checkpoint(config: Any, folder: Path) -> Path | None:
    """Return the checkpoint to resume from, None to start; refuse a folder of another run.

    The newest valid one of the folder, or the given one, whose branch is continued where the folder
    has it already. ValueError too where no checkpoint of the folder's run can be used, unless the
    run is to start anew, and for one that is beyond max_steps.
    """
    key, resume = _resume_key(config), _resume(config)
    newest, skipped = newest_valid(folder / "checkpoints")
    for reason in skipped:
        logger.warning("checkpoint skipped: %s", reason)
    if resume not in ("auto", "never"):
        found = _given_checkpoint(resume, newest, config)
    elif newest is None:
        if resume == "auto" and _holds_run(folder):
            raise ValueError(_nothing_usable(folder, skipped, key))
        return None
    elif resume == "never":
        raise ValueError(
            f"{folder} already holds a run ({newest.name}); --{key}=auto continues it, "
            "another --output_dir starts a new one"
        )
    else:
        found = newest
    if newest is not None:
        _check_settings(newest, config, f"{folder} holds a run")
    elif _holds_run(folder) and _is_of_other_settings(config, folder):
        raise ValueError(f"{folder} holds a run with other settings; choose another --output_dir")
    _check_max_steps(found, config)
    return found


def _given_checkpoint(given: str, newest: Path | None, config: Any) -> Path:
    """Return the checkpoint that a branch begins from, or the newest of the folder on that branch.

    So the same command continues a branch as it continues a run.
    """
    key, path = _resume_key(config), Path(given).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{key}={path} does not exist, expected a checkpoint")
    if within := checkpoint_folders(path / "checkpoints"):
        raise ValueError(
            f"{key}={path} is a run folder, expected a checkpoint, such as {within[-1]}"
        )
    validate_checkpoint(path)
    _check_settings(path, config, f"{key}={path} is of a run")
    if newest is not None and read_lineage(newest) == branch_at(path):
        logger.info("%s continues the branch that began at %s", newest, path)
        return newest
    return path


def _nothing_usable(folder: Path, skipped: list[str], key: str) -> str:
    """Say why a run can be neither continued nor started over."""
    if skipped:
        more = f", and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        what = f"a run of whose checkpoints none can be used ({'; '.join(skipped[:3])}{more})"
    else:
        names = ", ".join(path.name for path in exports_of(folder))
        what = f"the result of a run ({names}) without any checkpoint"
    return (
        f"{folder} holds {what}; put a valid checkpoint back, choose another --output_dir, or "
        f"start anew with --{key}=never, which moves what is there to {next_previous(folder)}"
    )


def _check_settings(checkpoint: Path, config: Any, what: str) -> None:
    """Raise ValueError where the run of a checkpoint had other settings.

    Its own copy is compared; where it has none, as of earlier versions, the run folder's file,
    and where that is gone too, the hash.
    """
    before = _settings_at(checkpoint, type(config))
    if before is None:
        if validate_checkpoint(checkpoint)["config_hash"] == config_hash(run_key(config)):
            return
        raise ValueError(
            f"{what} whose settings are not known: {checkpoint} has no copy of them, and its hash "
            "is not of those given; put the config.yaml of that run into it, or choose another "
            "--output_dir"
        )
    old, new = run_key(before), run_key(config)
    differing = [f"{key}: {old[key]!r} -> {new[key]!r}" for key in new if old[key] != new[key]]
    if differing:
        raise ValueError(
            f"{what} with other settings ({'; '.join(differing)}); set them back, or choose "
            "another --output_dir"
        )


def _check_max_steps(checkpoint: Path, config: Any) -> None:
    """Raise ValueError for a run that would end before the checkpoint that it begins from."""
    settings, step = flat(config), checkpoint_step(checkpoint)
    key = _resume_key(config).replace("resume", "max_steps")
    if settings[key] < step:
        raise ValueError(
            f"{key}={settings[key]} is less than the {step} steps of {checkpoint}; set {step} or "
            f"more, begin a branch with --{_resume_key(config)}=PATH of an earlier checkpoint, "
            "or choose another --output_dir"
        )


def _settings_at(checkpoint: Path, kind: type[Settings]) -> Settings | None:
    """Return the settings that a checkpoint's run had, None where nothing tells."""
    for path in (checkpoint / CONFIG, checkpoint.parent.parent / CONFIG):
        if path.is_file():
            return load_stored_config(path, kind)
    return None


def _is_of_other_settings(config: Any, folder: Path) -> bool:
    """Return whether a folder's leftovers are of another run than this, or of an unknown one."""
    if not has_leftovers(folder):
        return False
    path = folder / CONFIG
    return not path.is_file() or (
        run_key(load_stored_config(path, type(config))) != run_key(config)
    )


def _holds_run(folder: Path) -> bool:
    """Return whether a folder has checkpoints, usable or not, or what a run exports at its end."""
    return bool(checkpoint_folders(folder / "checkpoints") or exports_of(folder))


def _resume_key(config: Any) -> str:
    return "resume" if "resume" in flat(config) else "train.resume"


def _resume(config: Any) -> str:
    return str(flat(config)[_resume_key(config)])


def _is_same(path: Path, given: str) -> bool:
    return path.resolve() == Path(given).expanduser().resolve()


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def with_step_limit(
    config: Settings, folder: Path, *, minutes: float, steps_within: Callable[[], int]
) -> Settings:
    """Return a config whose limit in minutes has become one in steps, once for a run.

    So no learning rate depends on the clock. A run that is continued already has its max_steps;
    else steps_within times them. The config has max_steps and max_minutes.
    """
    if not minutes:
        return config
    before = _settings_before(config, folder)
    if before is not None:
        known: Settings = _limited(config, flat(before)["max_steps"])
        if run_key(known) == run_key(before):
            return known
    limited = _limited(config, steps_within())
    logger.info("max_minutes=%g become max_steps=%d", minutes, flat(limited)["max_steps"])
    return limited


def load_state(recipe: Recipe, start: Start) -> None:
    """Give a recipe the state of the checkpoint that its run begins from."""
    if start.checkpoint is None:
        return
    checkpoint = load_checkpoint(start.checkpoint)
    recipe.load(checkpoint.tensors, checkpoint.state)
    logger.info("resumed after step %d from %s", checkpoint.step, start.checkpoint)


class CheckpointWriter:
    """Saves a run's state, next to training where a copy fits into memory, and deletes old ones."""

    def __init__(
        self,
        folder: Path,
        settings: LoopSettings,
        config: Any,
        accelerator: Accelerator,
        lineage: Lineage = (),
    ) -> None:
        """config: all settings of the run, a copy of which goes into each checkpoint."""
        self.root, self.settings, self.accelerator = folder / "checkpoints", settings, accelerator
        self.config, self.lineage = config, lineage
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
        state, losses = recipe.state(), recipe.ranking()
        size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
        fits = size < SPARE_MEMORY * psutil.virtual_memory().available
        if fits:
            tensors = snapshot(tensors)

        def save() -> None:
            path = save_checkpoint(
                self.root,
                step=step,
                tensors=tensors,
                state=state,
                config_hash=config_hash(run_key(self.config)),
                world_size=self.accelerator.num_processes,
                config=to_yaml(self.config),
                lineage=self.lineage,
            )
            logger.info("checkpoint saved: %s", path)
            prune_checkpoints(
                self.root,
                keep_last=self.settings.keep_checkpoints,
                keep_every_steps=self.settings.keep_every_steps or None,
                losses=losses if self.settings.keep_best else None,
                lineage=self.lineage,
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


def _settings_before(config: Settings, folder: Path) -> Settings | None:
    """Return the settings of the run that would be continued, None where there is none."""
    resume = _resume(config)
    if resume == "never":
        return None
    is_given = resume != "auto"
    found = Path(resume).expanduser() if is_given else newest_valid(folder / "checkpoints")[0]
    if found is not None:
        return _settings_at(found, type(config))
    path = folder / CONFIG
    return load_stored_config(path, type(config)) if path.is_file() else None


def _limited(config: Settings, max_steps: int) -> Settings:
    changed: Any = config
    limited: Settings = dataclasses.replace(changed, max_steps=max_steps, max_minutes=0.0)
    return limited
