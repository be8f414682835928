"""The names that a setting may take are those that the code knows: adding one is two edits."""

from typing import Any, get_args

import pytest

from latentdiff.config import choices
from latentdiff.config.train import LEARNING_RATES
from latentdiff.data.degradations import DEGRADATIONS
from latentdiff.data.inpaint_masks import DRAWERS
from latentdiff.diffusion import ddpm, loss_weighting, prediction, schedules, timesteps
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.pipeline.schedulers import SCHEDULERS
from latentdiff.training.finetune.methods import TRAINABLE
from latentdiff.training.optim.optimizer import OPTIMIZERS
from latentdiff.training.trackers import PACKAGES


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (choices.BetaSchedule, schedules.BETA_SCHEDULES),
        (choices.PredictionType, prediction.PREDICTION_TYPES),
        (choices.VarianceType, ddpm.VARIANCE_TYPES),
        (choices.LossWeighting, ("none", *loss_weighting.LOSS_WEIGHTINGS)),
        (choices.TimestepSampling, timesteps.TIMESTEP_SAMPLINGS),
        (choices.Scheduler, SCHEDULERS),
        (choices.Tracker, ("none", *PACKAGES)),
        (choices.OptimizerName, OPTIMIZERS),
        (choices.OptimizerName, LEARNING_RATES),
        (choices.ConditionKind, ("none", *CONDITION_KINDS)),
        (choices.Degradation, DEGRADATIONS),
        (choices.InpaintMasks, ("random", "file", *DRAWERS)),
    ],
)
def test_settings_offer_exactly_the_names_that_the_code_knows(names: Any, known: Any) -> None:
    assert set(get_args(names)) == set(known)


def test_every_partial_method_is_one_of_the_settings() -> None:
    assert set(TRAINABLE) <= set(get_args(choices.FinetuneMethod))
