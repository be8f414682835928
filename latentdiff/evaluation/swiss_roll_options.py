"""What scripts/swiss_roll.py may be told; imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RollOptions:
    """How large the example is.

    Args:
        steps: optimiser steps.
        num_timesteps: length of the chain.
        num_points: of each cloud, and of the bound.
        known: what the first coordinate is known to be.
        tolerance: its standard deviation.
        seed: of every draw.
    """

    steps: int = 6000
    num_timesteps: int = 100
    num_points: int = 4000
    known: float = 0.5
    tolerance: float = 0.1
    seed: int = 0
