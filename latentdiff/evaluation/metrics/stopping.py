"""When to stop: whether a run still gains, is flat or overfits, from paired measurements.

A state of a model has a cost for each of n units, which are the same at every evaluation: the loss
of a held-out image on fixed timesteps and noise, or how unlike its subject the image of one prompt
and seed is. Two states are compared unit by unit, so what makes a unit hard cancels, and the mean
difference has Student's 95 % interval over the units, which holds for the few of a small folder.

The rule, at each evaluation:

- gaining: the cost is below that of the last state that gained (the first state, to begin with),
  by an interval that excludes 0. Gains too small for one evaluation add up until they count;
- overfitting: not gaining, and the cost is above that of the best state by such an interval; or,
  where a run measures the drift of unrelated prompts instead of a held-out loss, the cost gains
  nothing and the drift is above that of the best state by such an interval;
- flat: neither.

Training should stop after CONFIRMATIONS evaluations in a row that overfit, or PATIENCE evaluations
without one that gains. The first is criterion UP of Prechelt (1998, "Early stopping - but when?")
with an interval in place of the sign. Of runs whose cost is constant but for independent noise,
the lowest of 12 evaluations being the one compared with, two in a row end 11 to 16 %, one alone
would end 54 to 57 % (150 runs each, of 4, 8 and 32 units). The best state is that
of the lowest cost; where only generated images measure it, the earliest that none after it betters
by more than a standard error (Breiman et al. 1984), as drift and copies grow with every step.
benchmarks/stopping.py measures what the two thresholds and others cost, on many small folders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from latentdiff.evaluation.metrics.bootstrap import Interval, student_difference

VerdictName = Literal["gaining", "flat", "overfitting"]
PATIENCE = 4  # evaluations without a gain
CONFIRMATIONS = 2  # evaluations in a row that overfit


@dataclass(frozen=True)
class State:
    """What one evaluation measured: the cost of each unit, and the drift of each prompt, if any."""

    step: int
    costs: Sequence[float]
    drift: Sequence[float] = ()

    @property
    def mean(self) -> float:
        """The mean cost."""
        return float(np.mean(self.costs))


@dataclass(frozen=True)
class Verdict:
    """The verdict on an evaluation.

    change: cost less that of the best state before, mean over units; best_step: of the best state
    so far; stops: whether training should stop; regret: cost of the state that the rule chose when
    it said so first, less that of the best state in hindsight, None until then.
    """

    name: VerdictName
    step: int
    change: Interval
    compared_step: int
    best_step: int
    stops: bool
    regret: Interval | None = None


@dataclass
class StopRule:
    """Judges evaluations in their order.

    margin: standard errors by which a later state must be better to become the best one.
    """

    margin: float = 0.0
    patience: int = PATIENCE
    confirmations: int = CONFIRMATIONS
    reference: State | None = None  # the last that gained
    best: State | None = None  # of the trained ones
    lowest: State | None = None  # of all, for the regret
    chosen: State | None = None  # the best when the rule first said stop
    best_steps: list[int] = field(default_factory=list)  # in the order in which they became it
    last_step: int = -1
    stop_step: int = -1  # where the rule first said stop
    num_worse: int = 0  # in a row, up to now
    num_idle: int = 0  # evaluations since one gained

    def add(self, state: State, *, counts: bool = True) -> Verdict | None:
        """Judge an evaluation; None for the first, and for one of a step that is known.

        counts: whether it may bring the end nearer; not while the learning rate still rises.
        ValueError for another number of units than before.
        """
        if state.step <= self.last_step:
            return None
        self.last_step = state.step
        if self.reference is None:
            self._take_first(state)
            return None
        before = self.best or self.reference
        name, change = self._name(state, before), student_difference(state.costs, before.costs)
        if name == "gaining":
            self.reference, self.num_idle = state, 0
        elif counts:
            self.num_idle += 1
        self.num_worse = self.num_worse + 1 if name == "overfitting" and counts else 0
        self._update_best(state)
        assert self.best is not None
        assert self.lowest is not None
        if self._wants_stop and self.chosen is None:
            self.chosen, self.stop_step = self.best, state.step
        return Verdict(
            name,
            state.step,
            change,
            before.step,
            self.best.step,
            self.chosen is not None,
            None
            if self.chosen is None
            else student_difference(self.chosen.costs, self.lowest.costs),
        )

    def _take_first(self, state: State) -> None:
        self.reference = state
        if state.step:  # a state that was not trained is none to keep
            self._update_best(state)

    def _name(self, state: State, before: State) -> VerdictName:
        assert self.reference is not None
        if student_difference(state.costs, self.reference.costs).high < 0:
            return "gaining"
        if student_difference(state.costs, before.costs).low > 0:
            return "overfitting"
        if len(state.drift) > 1 and student_difference(state.drift, before.drift).low > 0:
            return "overfitting"
        return "flat"

    def _update_best(self, state: State) -> None:
        if self.lowest is None or state.mean < self.lowest.mean:
            self.lowest = state
        if self.best is not None:
            gains = np.subtract(self.best.costs, state.costs)
            if gains.mean() <= self.margin * gains.std(ddof=1) / len(gains) ** 0.5:
                return
        self.best = state
        self.best_steps.append(state.step)

    @property
    def _wants_stop(self) -> bool:
        return self.num_worse >= self.confirmations or self.num_idle >= self.patience

    def ranking(self) -> dict[int, float]:
        """Return a rank by step, the lowest for the best state: what to keep and to export."""
        return {step: -float(k) for k, step in enumerate(self.best_steps)}

    def to_json(self) -> dict[str, Any]:
        """Return all that `from_json` needs to go on as if never interrupted."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "StopRule":
        """Return the rule whose `to_json` is given."""
        states = ("reference", "best", "lowest", "chosen")
        given = {name: State(**stored[name]) for name in states if stored[name] is not None}
        return cls(**{**stored, **given})
