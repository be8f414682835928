"""Inference: from a Stable-Diffusion folder and a prompt to pictures."""

from latentdiff.pipeline.output import LatentDiffOutput
from latentdiff.pipeline.pipeline import LatentDiffPipeline

__all__ = ["LatentDiffOutput", "LatentDiffPipeline"]
