"""The verdicts of a run on its evaluations, in its log, metrics and checkpoints.

The rule is evaluation/metrics/stopping.py's, what is measured that of heldout.py and, on generated
images, of sample_costs.py.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.metrics.stopping import State, StopRule, Verdict

logger = logging.getLogger(__name__)
Measure = Literal["held-out loss", "unlikeness to the subject"]
MARGINS: dict[Measure, float] = {"held-out loss": 0.0, "unlikeness to the subject": 1.0}


class RunVerdicts:
    """Judges a run's evaluations, each once, on every process alike.

    ends_run: whether the run ends where the rule says so; else that is logged once. While the
    learning rate still rises, over warmup_steps, no evaluation brings the end nearer.
    """

    def __init__(self, measure: Measure, *, ends_run: bool, warmup_steps: int = 0) -> None:
        self.measure, self.ends_run, self.warmup_steps = measure, ends_run, warmup_steps
        self.rule = StopRule(margin=MARGINS[measure])
        self.verdict: Verdict | None = None
        self.stops_now = False

    def add(self, step: int, costs: Sequence[float], *, drift: Sequence[float] = ()) -> None:
        """Judge an evaluation by the cost of each unit; `verdict` has the result.

        One with costs that are not finite is left out.
        """
        if not all(map(math.isfinite, (*costs, *drift))):
            return
        first_stop = self.rule.chosen is None
        self.verdict = self.rule.add(
            State(step, list(costs), list(drift)), counts=step > self.warmup_steps
        )
        self.stops_now = first_stop and self.rule.chosen is not None

    @property
    def ends(self) -> bool:
        """Whether training ends here."""
        return self.ends_run and self.rule.chosen is not None

    def figures(self) -> dict[str, float | str]:
        """Return the verdict as a line of metrics has it; {} where there is none yet."""
        if (verdict := self.verdict) is None:
            return {}
        found: dict[str, float | str] = {
            "verdict": verdict.name,
            "verdict_measure": self.measure,
            **_interval("change", verdict.change),
            "change_since_step": verdict.compared_step,
            "num_pairs": verdict.change.num_samples,
            "best_step": verdict.best_step,
        }
        if verdict.regret is not None and self.rule.chosen is not None:
            found |= {"stop_step": self.rule.stop_step, "chosen_step": self.rule.chosen.step}
            found |= _interval("regret", verdict.regret)
        return found

    def log_stop(self, max_steps: int) -> None:
        """Log, once, that the rule says stop: on the main process."""
        if not self.stops_now or self.rule.chosen is None:
            return
        rule, best = self.rule, self.rule.chosen.step
        why = (
            f"{rule.num_worse} evaluations in a row overfit"
            if rule.num_worse >= rule.confirmations
            else f"no gain in {rule.num_idle} evaluations"
        )
        if self.ends_run:
            logger.info(
                "training stops after step %d of %d: %s; the best, step %d, is exported",
                *(rule.last_step, max_steps, why, best),
            )
        else:
            logger.info(
                "training could stop here, after step %d: %s; best so far: step %d. "
                "--train.stop=auto ends a run here and exports its best",
                *(rule.last_step, why, best),
            )

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"measure": self.measure, "rule": self.rule.to_json()}

    def load(self, stored: Mapping[str, Any] | None) -> None:
        """Take it back; verdicts by another measure are forgotten."""
        if stored is not None and stored["measure"] == self.measure:
            self.rule = StopRule.from_json(stored["rule"])


def _interval(name: str, interval: Interval) -> dict[str, float | str]:
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}
