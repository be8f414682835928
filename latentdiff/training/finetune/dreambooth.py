"""Prior preservation (Ruiz et al. 2023): the model's own images of a class next to the subject's.

The base model generates the class images once, each from a seed of its own, into a captioned folder
named by model, prompt and sampling settings; a later run uses them again and adds missing ones.
Half of each step's images are then of the class, weighted by prior_loss_weight.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.atomic import atomic_file, write_text
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.evaluation.metrics.heldout_loss import rank_batches
from latentdiff.models.components import Components
from latentdiff.models.text import clip_skip_of
from latentdiff.sampling.batch_sampler import generate_images
from latentdiff.training.inputs.batches import EpochOrder, StepBatch
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.randomness import SampleKey
from latentdiff.training.text_to_image.preview import BATCH_SIZE, make_pipeline, prompt_seed

logger = logging.getLogger(__name__)


class SubjectAndClassDataset(Dataset[dict[str, Tensor]]):
    """The subject's samples, then those of the class, weighted by prior_loss_weight."""

    def __init__(
        self,
        subject: LatentDataset,
        prior: LatentDataset,
        *,
        num_subject: int,
        prior_loss_weight: float,
    ) -> None:
        self.subject, self.prior = subject, prior
        self.num_subject, self.prior_loss_weight = num_subject, prior_loss_weight

    def __getitem__(self, key: SampleKey) -> dict[str, Tensor]:
        """Return the sample of a key, as LatentDataset does."""
        if key.index < self.num_subject:
            return self.subject[key]
        sample = self.prior[replace(key, index=key.index - self.num_subject)]
        weight = sample["weight"] * self.prior_loss_weight
        return sample | {"weight": weight, "index": torch.tensor(key.index, dtype=torch.int64)}


class PairedOrder:
    """The order of steps that take as many images of the class as of the subject."""

    def __init__(self, subject: EpochOrder, prior: EpochOrder) -> None:
        self.subject, self.prior = subject, prior
        self.bucket_of, self.steps_per_epoch = subject.bucket_of, subject.steps_per_epoch
        self.draws = subject.draws

    def batch(self, step: int) -> StepBatch:
        """Return the records of optimiser step `step`; epochs are the subject's."""
        own, others = self.subject.batch(step), self.prior.batch(step)
        paired = len(self.bucket_of) + others.indices[: len(own.indices)]
        return StepBatch(own.epoch, own.start, np.concatenate([own.indices, paired]))

    def count(self, step: int) -> int:
        """Return how many samples optimiser step `step` takes."""
        return len(self.batch(step).indices)


class AllOnesMasks:
    """Masks that keep all of each class image, where the subject's have masks."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = (1, *shape[1:])

    def mask(self, index: int, *, flipped: bool, crop: float) -> Tensor:
        """Return ones (1, h, w)."""
        return torch.ones(self.shape)


def class_seed(seed: int) -> int:
    """Return the seed of the class images' noise, timesteps and order."""
    return prompt_seed(seed, "class pictures")  # a key, not prose: it fixes random numbers


def generate_class_images(
    config: Config,
    components: Components,
    *,
    base_hash: str,
    run_folder: Path,
    accelerator: Accelerator,
) -> Folder:
    """Generate the class images that are missing; return all of them as a folder.

    Shared out over the processes. Image k is the same, but for rounding, for any number of
    processes and of images that exist already.
    """
    settings = config.finetune
    made_by = {
        "model": base_hash,
        "scheduler": {k: str(v) for k, v in sorted(components.scheduler.config.items())},
        "prompt": settings.class_prompt,
        "resolution": config.data.side_px,
        "num_steps": settings.class_num_steps,
        "guidance_scale": settings.class_guidance_scale,
    }
    if skipped := clip_skip_of(components.text_encoder):
        made_by["clip_skip"] = skipped
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(settings.class_images_dir or run_folder / "class_images").expanduser() / key
    root.mkdir(parents=True, exist_ok=True)
    names = [f"{k:05d}.png" for k in range(settings.num_class_images)]
    missing = [k for k, name in enumerate(names) if not (root / name).is_file()]
    if missing and accelerator.is_main_process:
        logger.info("generating %d images of %r into %s", len(missing), settings.class_prompt, root)
    accelerator.wait_for_everyone()  # all have seen the same files
    _generate(config, components, root, missing, accelerator=accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        made = sorted(path.name for path in root.glob("*.png"))  # maybe more than asked for
        rows = [{"file_name": name, "text": settings.class_prompt} for name in made]
        write_text(root / "metadata.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    accelerator.wait_for_everyone()
    folder = read_folder(root)
    folder.check()
    return folder.select(np.arange(settings.num_class_images))


@torch.no_grad()
def _generate(
    config: Config,
    components: Components,
    root: Path,
    missing: Sequence[int],
    *,
    accelerator: Accelerator,
) -> None:
    """Generate this process's share of the missing images, by their numbers, into `root`."""
    settings, size = config.finetune, config.data.side_px
    if not missing:
        return
    pipeline = make_pipeline(replace(components, safety_checker=None, feature_extractor=None))
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    shard = accelerator.process_index, accelerator.num_processes
    images = generate_images(
        pipeline,
        [settings.class_prompt] * len(missing),
        seeds=[prompt_seed(number, settings.class_prompt) for number in missing],
        batch_size=BATCH_SIZE,
        num_inference_steps=settings.class_num_steps,
        guidance_scale=settings.class_guidance_scale,
        size=(size, size),
        batches=rank_batches(-(-len(missing) // BATCH_SIZE), shard),
    )
    with accelerator.autocast():
        for k, image in images:
            with atomic_file(root / f"{missing[k]:05d}.png") as temporary:
                image.save(temporary, format="PNG")
