"""The export: pipeline/, with EMA weights, in Stable Diffusion's format."""

import json
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from latentdiff.pipeline.facts import Facts
from latentdiff.training.engine import Engine
from latentdiff.training.preview import make_pipeline
from latentdiff.training.run import Run


def export(run: Run) -> None:
    """Write pipeline/: the model with EMA weights, in Stable Diffusion's format."""
    if run.accelerator.is_main_process:
        final, temporary = run.folder / "pipeline", run.folder / ".pipeline.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        with averaged(run.engine):
            run.components.unet.to(memory_format=torch.contiguous_format)
            pipeline = make_pipeline(run.components)
            pipeline.facts = _facts(run)
            pipeline.save_pretrained(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    run.accelerator.wait_for_everyone()


def _facts(run: Run) -> Facts:
    config = run.config
    last: dict[str, float] = {}
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


def averaged(engine: Engine) -> AbstractContextManager[None]:
    return nullcontext() if engine.ema is None else engine.ema.swapped_in(engine.model)
