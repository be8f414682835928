"""Train a small CLIP (Radford et al. 2021) on captioned folders: open_clip's model and its loss.

It gives a text encoder that a U-Net can be conditioned on, and the whole scores images against
captions. Recall at k is measured on the folders' held-out pairs.
"""

import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from latentdiff.atomic import atomic_folder, write_text
from latentdiff.config.clip import ClipConfig
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.eval_set import read_pixels
from latentdiff.evaluation.metrics.clip import preprocess, recall_at
from latentdiff.models.open_clip import (
    clip_from_open_clip,
    clip_tokenizer_from_open_clip,
    text_encoder_from_open_clip,
)
from latentdiff.models.save import save_component
from latentdiff.models.text import tokenize, train_tokenizer
from latentdiff.training.bill.folder_runs import MAX_INVALID, read_roots
from latentdiff.training.checkpoint import Parts
from latentdiff.training.clip.pairs import DistinctCaptions, Pairs, collate_pairs
from latentdiff.training.inputs.workers import ignore_signals, start_workers
from latentdiff.training.loop import train_in_one_process
from latentdiff.training.metrics_log import MeanLosses
from latentdiff.training.optim.lr import learning_rate
from latentdiff.training.optim.mixed_precision import AmpStep
from latentdiff.training.optim.optimizer import parameter_groups
from latentdiff.training.recipe import Recipe

LARGEST_SCALE = math.log(100)  # Radford et al. 2021, Sec. 2.5
RECALLS = (1, 5, 10)

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, list[str]]


def train_clip(config: ClipConfig) -> int:
    """Train; return the exit status: 0 done, 143 or 130 stopped by a signal, its state saved.

    Writes config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and, at the end, metrics.json with
    the held-out recall, clip/ with a transformers CLIPModel and its tokenizer, and text_encoder/
    and tokenizer/ for model.text_encoder of a text-to-image run. ValueError when there is nothing
    to learn from, FloatingPointError when a loss is not finite any more.
    """
    folders = read_roots(ClipConfig, config.roots)
    for folder in folders:
        folder.check(max_invalid_fraction=MAX_INVALID)
    if not any(len(folder.split("train")) for folder in folders):
        raise ValueError(f"roots={list(config.roots)} hold no training images; give --roots")

    def build(settings: ClipConfig, folder: Path, accelerator: Accelerator) -> ClipRecipe:
        return ClipRecipe(settings, folder, folders, accelerator)

    return train_in_one_process(config, build, folders=folders)


class ClipRecipe(Recipe):
    """Contrastive training of a CLIP on the training pairs of folders."""

    def __init__(
        self, config: ClipConfig, folder: Path, folders: list[Folder], accelerator: Accelerator
    ) -> None:
        """folder: of the run; folders: of the captioned images."""
        super().__init__()
        self.config, self.folder, self.folders = config, folder, folders
        self.accelerator, self.losses = accelerator, MeanLosses()
        self.train = [f.split("train") for f in folders]
        self.steps_per_epoch = sum(map(len, self.train)) / config.batch_size
        torch.manual_seed(config.seed)
        self.tokenizer = _tokenizer(config, self.train)
        self.model = build_clip(config, self.tokenizer).to(accelerator.device).train()
        groups = parameter_groups(self.model, weight_decay=config.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
        fp16 = config.mixed_precision == "fp16"
        self.clip_step = AmpStep(self.model, optimizer, fp16=fp16, max_norm=1.0)
        self.clip_loss = ClipLoss()
        self.attention = partial(attention_kernel, accelerator.device, config.mixed_precision)
        self.learning_rate = partial(  # half a cosine over the whole run, times the warm-up
            learning_rate,
            base=config.learning_rate,
            schedule="cosine",
            lr_warmup_steps=config.lr_warmup_steps,
            max_steps=config.max_steps,
            decay_from=0,
        )

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Return pixels (B, 3, H, W) in [-1, 1] and their captions, without end."""
        config = self.config
        loader = DataLoader(  # of batches, which the collation makes of pairs
            Pairs(self.train, config.resolution, config.min_crop, config.random_flip, config.seed),
            batch_sampler=DistinctCaptions(
                self.train, config.batch_size, config.seed, first_step=first_step
            ),
            collate_fn=collate_pairs,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )
        return start_workers(loader)

    def step(self, batches: Iterator[Batch], step: int) -> int:
        """Do optimiser step `step`."""
        pixels, captions = next(batches)
        device = self.accelerator.device
        pixels = preprocess(pixels.to(device), size=self.config.resolution)
        ids = tokenize(self.tokenizer, captions).to(device)
        with self.accelerator.autocast(), self.attention():
            images, texts, scale = self.model(pixels, ids)
            loss = self.clip_loss(images.float(), texts.float(), scale)
        self.clip_step.step(loss, learning_rate=self.learning_rate(step))
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=LARGEST_SCALE)
        self.losses.add({"loss": loss.detach()})
        return len(captions)

    def figures(self, step: int) -> dict[str, float]:
        """Return the mean loss."""
        return self.losses.close(step) | {"learning_rate": self.learning_rate(step - 1)}

    def next_commands(self) -> list[str]:
        """Return how to condition a model on this text encoder."""
        path = shlex.quote(f"{self.folder / 'text_encoder'}")
        return [f"train --config CONFIG --data.root=FOLDER --model.text_encoder={path}"]

    def tensors(self) -> Parts:
        """Return weights, optimiser state, and the losses since the last log line."""
        return {**self.clip_step.tensors(), **self.losses.tensors()}

    def state(self) -> dict[str, Any]:
        """Return the numbers next to them."""
        made_of = self.materials.to_json() if self.materials else None
        return self.clip_step.state() | {"materials": made_of}

    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take both back."""
        self.clip_step.load(tensors, state)
        self.losses.load(tensors, self.accelerator.device)

    def export(self) -> None:
        """Write clip/, text_encoder/, tokenizer/, and the held-out recall in metrics.json."""
        model, tokenizer, config = self.model.eval(), self.tokenizer, self.config
        report = {
            "steps": float(config.max_steps),
            "logit_scale": model.logit_scale.exp().item(),
        }
        for root, folder in zip(config.roots, self.folders, strict=True):
            if len(heldout := folder.heldout()) > max(RECALLS):
                report |= heldout_recall(
                    model, tokenizer, heldout, name=Path(root).name, resolution=config.resolution
                )
        tokenize(tokenizer, [""])  # it saves how it was used last, also where no step was left
        parts = {
            "clip": clip_from_open_clip(model.cpu().float(), eos_token_id=tokenizer.eos_token_id),
            "text_encoder": text_encoder_from_open_clip(model, eos_token_id=tokenizer.eos_token_id),
            "tokenizer": tokenizer,
        }
        for name, part in parts.items():
            with atomic_folder(self.folder / name) as temporary:
                save_component(part, temporary)
                if name == "clip":
                    save_component(tokenizer, temporary)
                if self.materials is not None:
                    self.materials.attach_to_folder(
                        temporary, artifact=name, lists_images=name == "clip"
                    )
        write_text(self.folder / "metrics.json", json.dumps(report, indent=2) + "\n")
        for name, value in report.items():
            if not name.endswith(("/low", "/high")):
                logger.info("%s: %.4g", name, value)
        logger.info(
            "wrote %s (for the CLIP score), text_encoder and tokenizer", self.folder / "clip"
        )


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer) -> CLIP:
    """Build open_clip's model with new weights."""
    return CLIP(
        config.embed_dim,
        CLIPVisionCfg(
            layers=config.num_layers,
            width=config.width,
            head_width=config.head_dim,
            patch_size=config.patch_size,
            image_size=config.resolution,
        ),
        CLIPTextCfg(
            context_length=tokenizer.model_max_length,
            vocab_size=len(tokenizer),
            width=config.text_width,
            heads=config.text_width // config.head_dim,
            layers=config.text_num_layers,
        ),
    )


def attention_kernel(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Choose the kernel of attention: in bf16 on a CPU plain products, faster backwards."""
    if device.type == "cpu" and precision == "bf16":
        kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return kernel
    return nullcontext()


@torch.no_grad()
def heldout_recall(
    model: Any,
    tokenizer: CLIPTokenizer,
    folder: Folder,
    *,
    name: str,
    resolution: int,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return recall at 1, 5 and 10, from images to captions and back, with 95 % intervals."""
    device = next(model.parameters()).device
    captions = [record.captions[0] for record in folder]
    images, texts = [], []
    for start in range(0, len(folder), batch_size):
        part = range(start, min(start + batch_size, len(folder)))
        pixels = [read_pixels(folder, i, height=resolution, width=resolution) for i in part]
        seen = preprocess(torch.stack(pixels).to(device), size=resolution)
        images.append(model.encode_image(seen, normalize=True))
        ids = tokenize(tokenizer, captions[start : part.stop]).to(device)
        texts.append(model.encode_text(ids, normalize=True))
    report: dict[str, float] = {f"num_captions/{name}": float(len(set(captions)))}
    for k in (k for k in RECALLS if k <= len(set(captions))):
        both = recall_at(torch.cat(images), torch.cat(texts), captions, k=k)
        for way, found in zip(("caption_of_image", "image_of_caption"), both, strict=True):
            key = f"recall@{k}/{way}/{name}"
            report |= {key: found.estimate, f"{key}/low": found.low, f"{key}/high": found.high}
    return report


def _tokenizer(config: ClipConfig, folders: Sequence[Folder]) -> CLIPTokenizer:
    if config.tokenizer == "open_clip":
        return clip_tokenizer_from_open_clip(max_length=config.max_tokens)
    captions = (text for folder in folders for record in folder for text in record.captions)
    return train_tokenizer(captions, vocab_size=config.vocab_size, max_length=config.max_tokens)
