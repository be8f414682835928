"""What generated images tell of a state: likeness to the subject, copies, drift of other prompts.

As `latentdiff compare` has them (evaluation/compare_subject.py): similarity of an image is the mean
cosine of its features to those of the training images (CLIP-I of Ruiz et al. 2023), drift of an
unrelated prompt 1 - cosine to the image that its seed gave at the first evaluation. Each prompt has
its seeds for the whole run, so that two states are compared image by image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor

from latentdiff.training.inputs.conditions import FixedCondition
from latentdiff.training.text_to_image.nearest_images import NearestImages, summarize_nearest
from latentdiff.training.text_to_image.preview import generate_share, image_guidance_scale
from latentdiff.training.text_to_image.setup import Run, make_nearest_images

FIRST_SEED = 20_000
NUM_COMPARED = 200  # training images that generated ones are compared with


@dataclass(frozen=True)
class Measured:
    """What the images of one evaluation tell: figures for the log, and units to compare by."""

    figures: dict[str, float] = field(default_factory=dict)
    costs: Sequence[float] = ()  # 1 - similarity of each image of the subject
    drift: Sequence[float] = ()  # of each unrelated prompt


class SampleCosts:
    """Measures images of the same prompts and seeds at every evaluation.

    prompts: the subject's, repeated up to num_samples images; unrelated: others, an image each.
    images: embeds and compares, used on the main process alone.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        num_samples: int,
        unrelated: Sequence[str],
        images: NearestImages,
    ) -> None:
        self.num_samples = num_samples
        self.prompts = [prompts[k % len(prompts)] for k in range(num_samples)] + list(unrelated)
        self.seeds = [FIRST_SEED + k for k in range(len(self.prompts))]
        self.images = images
        self.first: Tensor | None = None  # features of the unrelated images at the beginning

    def measure(self, run: Run, conditions: Sequence[FixedCondition] = ()) -> Measured:
        """Generate the images, a share on each process, and measure them; all get the result.

        conditions: of the sheets, for a model that reads them.
        """
        preview = run.config.preview
        own = generate_share(
            run.components,
            self.prompts,
            accelerator=run.accelerator,
            seed=run.config.train.seed,
            seeds=self.seeds,
            num_steps=preview.num_steps,
            guidance_scale=preview.guidance_scale,
            image_guidance=image_guidance_scale(run.config),
            prompt_weighting=bool(preview.prompts),
            conditions=[conditions[k % len(conditions)] for k in range(len(self.prompts))]
            if conditions
            else (),
            controlnet=run.controlnet,
        )
        generated = dict(gather_object(list(own.items())))
        found = [Measured()]
        if run.accelerator.is_main_process:
            found = [self.measure_images([generated[k] for k in range(len(self.prompts))])]
        broadcast_object_list(found)
        return found[0]

    def measure_images(self, images: Sequence[Image.Image]) -> Measured:
        """Measure the images of `prompts`, in their order."""
        own, others = list(images[: self.num_samples]), list(images[self.num_samples :])
        similar = self.images.similarities(own)
        nearest = summarize_nearest(self.images.find(own))
        figures = mean_and_error("similarity", similar)
        figures |= {f"samples_{name}": value for name, value in nearest.items()}
        drift: Tensor = torch.zeros(0)
        if others:
            features = self.images.embed(others)
            self.first = features if self.first is None else self.first
            drift = 1 - (features * self.first).sum(1)
            figures |= mean_and_error("drift", drift)
        return Measured(figures, (1 - similar).tolist(), drift.tolist())

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint holds: what drift is measured from."""
        first = None if self.first is None else self.first.tolist()
        return {"prompts": self.prompts, "first": first}

    def load(self, stored: Mapping[str, Any] | None) -> bool:
        """Take it back; return whether it is of the same prompts."""
        if stored is None or stored["prompts"] != self.prompts:
            return False
        self.first = None if stored["first"] is None else torch.tensor(stored["first"])
        return True


def mean_and_error(name: str, values: Tensor) -> dict[str, float]:
    """Return the mean of values (n,) and, from two on, its standard error."""
    figures = {name: float(values.mean())}
    if len(values) > 1:
        figures[f"{name}_se"] = float(values.std() / len(values) ** 0.5)
    return figures


def sample_costs(run: Run, prompts: Sequence[str]) -> SampleCosts:
    """Return what measures generated images of these prompts as the run's settings say."""
    config = run.config
    preview = replace(config.preview, num_nearest=config.preview.num_nearest or NUM_COMPARED)
    images = make_nearest_images(
        replace(config, preview=preview), run.train_data, device=run.accelerator.device
    )
    assert images is not None
    return SampleCosts(
        prompts,
        num_samples=config.eval.num_samples,
        unrelated=config.eval.unrelated_prompts,
        images=images,
    )
