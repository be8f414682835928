"""The held-out loss of a run's state, its figures for the log, and the loss of each image.

What is measured is evaluation/metrics/heldout_loss.py's business.
"""

from functools import partial

from accelerate.utils import broadcast_object_list
from torch import Tensor

from latentdiff.evaluation.metrics.heldout_loss import (
    summarize_gap,
    summarize_losses,
    triple_losses,
)
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.text_to_image.setup import Run


def heldout_losses(run: Run) -> tuple[dict[str, float], list[float]]:
    """Measure the held-out loss, and that of training images next to it; all processes share in it.

    The gap of the two tells overfitting. Returns figures, which also have what captions are
    worth, and the loss of each held-out image, the same on all processes. The model is in
    evaluation mode, with the weights to measure; the run has held-out triples.
    """
    objective, model = run.train_step.objective, run.train_step.model
    triples, trained = run.train_data.heldout_triples, run.train_data.train_triples
    assert triples is not None
    assert trained is not None

    def denoise(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        with run.accelerator.autocast():
            return model(zt, t, conditioning)

    measure = partial(
        triple_losses,
        denoise,
        objective.schedule,
        prediction_type=objective.prediction_type,
        device=run.accelerator.device,
        shard=(run.accelerator.process_index, run.accelerator.num_processes),
    )
    losses = run.accelerator.reduce(measure(triples), "sum")
    trained_share = measure(trained, captions=["true"])
    trained_losses = run.accelerator.reduce(trained_share, "sum")["true"]
    num_timesteps = objective.schedule.num_timesteps
    figures = summarize_losses(losses, triples.t, num_timesteps=num_timesteps)
    figures |= summarize_gap(losses["true"][triples.order], trained_losses[trained.order])
    costs = [image_losses(losses["true"], triples.images)]
    broadcast_object_list(costs)  # the verdict of all is that of the main process
    return figures, costs[0]


def image_losses(losses: Tensor, images: Tensor | None) -> list[float]:
    """Return the mean loss of each image, from those of its triples (n,) and their images (n,).

    Of a single image, or of unknown ones, the losses of the triples.
    """
    values = losses.double().cpu()
    if images is None or len(images.unique()) == 1:
        return [float(value) for value in values]
    _, group = images.unique(return_inverse=True)
    counts = group.bincount()
    return [float(value) for value in group.bincount(values) / counts]
