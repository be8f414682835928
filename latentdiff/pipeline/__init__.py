"""Inference: from a Stable-Diffusion folder and a prompt to images.

Names are loaded when first used, so that options can be read without the models' libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipeline.output import LatentDiffOutput
    from latentdiff.pipeline.pipeline import LatentDiffPipeline

__all__ = ["LatentDiffOutput", "LatentDiffPipeline"]

_HOMES = {
    "LatentDiffOutput": "latentdiff.pipeline.output",
    "LatentDiffPipeline": "latentdiff.pipeline.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
