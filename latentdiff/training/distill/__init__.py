"""Distillation: a student of fewer sampling steps, stage by stage, on the text-to-image run."""
