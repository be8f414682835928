"""The entry for diffusers: DiffusionPipeline.from_pretrained(path, custom_pipeline="pipelines")."""

from latentdiff.pipeline.pipeline import LatentDiffPipeline

__all__ = ["LatentDiffPipeline"]
