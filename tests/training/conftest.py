"""Fixtures of the training tests."""

from fakes_finetune import world

__all__ = ["world"]
