"""What a trained model's folder says of itself beside its weights: `latentdiff.json`.

Plain JSON that other programs may ignore. Training writes it; the pipeline warns from it, and the
model card is made of it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from latentdiff.atomic import write_text

FILE_NAME = "latentdiff.json"
GUIDANCE_SCALE = 7.5  # of a model that does not name one, as in diffusers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """How a model came to be; None where it is not known.

    caption_dropout: part of the captions replaced by the empty one in training, 0 for none at all.
    steps: optimiser steps. metrics: name to value, with sample counts where they are estimates.
    guidance_scale: what images are drawn with where a call does not say.
    """

    caption_dropout: float | None = None
    prediction_type: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    licence: str | None = None
    steps: int | None = None
    resolution: int | None = None
    guidance_scale: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


def read_model_info(folder: str | os.PathLike[str]) -> ModelInfo:
    """Read a folder's facts; all unknown where it has none.

    Entries of other programs or versions are ignored. Raises ValueError for a broken file.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return ModelInfo()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; delete or mend the file") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(entries).__name__}")
    known = {one.name for one in fields(ModelInfo)}
    return ModelInfo(**{name: value for name, value in entries.items() if name in known})


def default_guidance(facts: ModelInfo) -> float:
    """Return the scale of guidance where a call does not say: the model's own, else 7.5."""
    return GUIDANCE_SCALE if facts.guidance_scale is None else facts.guidance_scale


def warn_if_guidance_untrained(facts: ModelInfo, scale: float) -> None:
    """Warn where guidance is asked of a model that never saw the empty caption."""
    if scale > 1 and facts.caption_dropout == 0:
        logger.warning(
            "guidance_scale is %g, but this model was trained without caption dropout and has no "
            "unconditional prediction to guide from; use guidance_scale=1",
            scale,
        )


def write_model_info(folder: str | os.PathLike[str], facts: ModelInfo) -> Path:
    """Write what is known to the folder's `latentdiff.json`, atomically; return the path."""
    known = {name: value for name, value in asdict(facts).items() if value not in (None, {})}
    path = Path(folder) / FILE_NAME
    write_text(path, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    return path
