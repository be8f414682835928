"""A finished run, opened again to trace its training: images as its loss reads them, its states."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentdiff.audit.attribution.gradients import Sample
from latentdiff.audit.twin import read_config
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.models.compatibility import reads_time_ids
from latentdiff.models.conditioning import Conditioning, make_time_ids
from latentdiff.models.latents import LatentCodec
from latentdiff.training.checkpoint import (
    checkpoint_folders,
    checkpoint_step,
    load_checkpoint,
    newest_valid,
)
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.finetune.dreambooth import SubjectAndClassDataset
from latentdiff.training.inputs.canaries import with_canaries
from latentdiff.training.inputs.dataset import LatentDataset, time_ids
from latentdiff.training.inputs.encode import TokenIds
from latentdiff.training.optim.state import load_parameters
from latentdiff.training.text_to_image.setup import Run, setup
from latentdiff.training.text_to_image.train_t2i import TextToImageRecipe


@dataclass(frozen=True, eq=False)
class TracedRun:
    """A run with the weights that it ended with."""

    run: Run

    @classmethod
    def open(cls, folder: Path) -> "TracedRun":
        """Set a run up as training did and load its newest checkpoint.

        Writes nothing but what its caches lack. ValueError or FileNotFoundError where there is no
        run or no checkpoint, or where its loss reads more than an image and a caption.
        """
        config = replace(read_config(folder), output_dir=str(folder))
        _check_traceable(config)
        newest, skipped = newest_valid(folder / "checkpoints")
        if newest is None:
            why = f" ({skipped[0]})" if skipped else ""
            raise ValueError(f"{folder} has no checkpoint{why}, whose gradients are needed")
        accelerator = start_accelerator(config)
        run = setup(with_canaries(config, accelerator), folder, accelerator)
        checkpoint = load_checkpoint(newest)
        TextToImageRecipe(run).load(checkpoint.tensors, checkpoint.state)
        return cls(run)

    @property
    def folder(self) -> Folder:
        """The training images, but for class images."""
        return self.run.train_data.train

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of a training image without buckets."""
        side = self.run.config.data.side_px
        return side, side

    def training_samples(self, indices: np.ndarray) -> Iterator[Sample]:
        """Yield training images in the middle of their crops, with their first caption."""
        data, dataset = self.run.train_data, self._dataset
        for index in indices.tolist():
            record = self.folder[index]
            text = data.source.batch([data.transform.first(record)])
            if dataset.gives_time_ids:
                sizes = time_ids(dataset.latents.plan, record, index, flipped=False, crop=0.5)
                text = replace(text, time_ids=sizes[None])
            mask = None
            if dataset.masks is not None:
                mask = dataset.masks.mask(index, flipped=False, crop=0.5)
            yield Sample(data.latents.moments(index)[0], text, mask)

    @torch.no_grad()
    def query_sample(self, image: Image.Image, prompt: str) -> Sample:
        """Return an image from elsewhere, encoded at its own size, under a prompt."""
        components = self.run.components
        codec = LatentCodec(components.vae)
        factor = codec.factor * 2 ** (len(components.unet.config["block_out_channels"]) - 1)
        width, height = (max(factor, side // factor * factor) for side in image.size)
        if not self.run.config.data.buckets:
            height, width = self.size
        cropped = resize_and_crop(image.convert("RGB"), height=height, width=width).image
        pixels = to_pixels(cropped)[None].to(components.vae.device)
        mean = codec.moments(pixels)[0]
        text = self._encoded(prompt)
        if reads_time_ids(components.unet.config):
            text = replace(text, time_ids=make_time_ids((height, width))[None])
        return Sample(mean[0].cpu(), text)

    def snapshots(self) -> Iterator[float]:
        """Give the model the weights of each checkpoint in turn; yield its learning rate.

        The weights of the last one stay.
        """
        train_step = self.run.train_step
        for path in checkpoint_folders(self.run.folder / "checkpoints"):
            load_parameters(train_step.parameters, load_checkpoint(path).tensors["model"])
            yield train_step.lr_schedule.at(max(0, checkpoint_step(path) - 1))

    def _encoded(self, prompt: str) -> Conditioning:
        source = self.run.train_data.source
        if isinstance(source, TokenIds):
            return source.batch([prompt])
        encoded: Conditioning = self.run.components.text_encoders.encode_captions([prompt])
        return encoded.to(torch.device("cpu"), torch.float32)

    @cached_property
    def _dataset(self) -> LatentDataset:
        dataset = self.run.train_data.dataset.dataset
        own = dataset.subject if isinstance(dataset, SubjectAndClassDataset) else dataset
        assert isinstance(own, LatentDataset)
        return own


def _check_traceable(config: Config) -> None:
    """Raise ValueError for a run whose loss is not that of an image under its caption."""
    reads = {
        "condition.kind": config.condition_kind if config.condition_kind != "none" else "",
        "distill.method": config.distill.method if config.distill.is_on else "",
    }
    for name, value in reads.items():
        if value:
            raise ValueError(
                f"the run has {name}={value}, and its loss is not that of an image under a caption "
                "alone, which is what is explained"
            )
