"""Train a small CLIP (Radford et al. 2021) on captioned folders: open_clip's model and its loss.

What comes out is a text encoder that a U-Net can be conditioned on, and the whole as a judge of
images against captions. Recall at k is measured on the folders' held-out pairs.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import CLIPTokenizer

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import to_yaml
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.evaluation.eval_set import read_pixels
from latentdiff.evaluation.metrics.clip import preprocess, recall_at
from latentdiff.models.open_clip import (
    clip_from_open_clip,
    clip_tokenizer_from_open_clip,
    text_encoder_from_open_clip,
)
from latentdiff.models.text import tokenize, train_tokenizer
from latentdiff.training.clip.pairs import DistinctCaptions, Pairs, collate_pairs
from latentdiff.training.distributed import single_process_accelerator
from latentdiff.training.metrics_log import LossLog
from latentdiff.training.optim.lr import TimedRate
from latentdiff.training.optim.optimizer import AmpStep, parameter_groups

LARGEST_SCALE = math.log(100)  # Radford et al. 2021, Sec. 2.5
RECALLS = (1, 5, 10)


def train_clip(config: ClipConfig) -> dict[str, float]:
    """Train, save, and return the held-out figures.

    output_dir/clip holds a transformers CLIPModel and its tokenizer; output_dir/text_encoder and
    output_dir/tokenizer are what model.text_encoder of a text-to-image run wants. ValueError when
    there is nothing to learn from, or the loss is no number any more.
    """
    folders = [read_folder(root) for root in config.roots]
    for folder in folders:
        folder.check(max_invalid_fraction=0.02)
    train = [folder.split("train") for folder in folders]
    if not any(len(folder) for folder in train):
        raise ValueError(f"roots={list(config.roots)} hold no training images; give --roots")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(config.seed)
    tokenizer = _tokenizer(config, train)
    accelerator = single_process_accelerator(config.mixed_precision)
    model = build_clip(config, tokenizer).to(accelerator.device)
    steps = _train_steps(model, tokenizer, train, config, accelerator)
    model.eval()
    report: dict[str, float] = {
        "steps": float(steps),
        "logit_scale": model.logit_scale.exp().item(),
    }
    for root, folder in zip(config.roots, folders, strict=True):
        if len(heldout := folder.heldout()) > max(RECALLS):
            report |= heldout_recall(
                model, tokenizer, heldout, name=Path(root).name, resolution=config.resolution
            )
    _save(model, tokenizer, output, report)
    return report


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


def _train_steps(
    model: CLIP,
    tokenizer: CLIPTokenizer,
    folders: Sequence[Folder],
    config: ClipConfig,
    accelerator: Accelerator,
) -> int:
    """Run the training loop; return the number of steps."""
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    rule = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))
    update = AmpStep(rule, fp16=config.mixed_precision == "fp16", max_norm=1.0)
    model.train()
    loss_of, batches = ClipLoss(), _batches(list(folders), config)
    rates = TimedRate(
        config.learning_rate,
        lr_warmup_steps=config.lr_warmup_steps,
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
    )
    bar = tqdm(range(config.max_steps), disable=not accelerator.is_main_process, unit="step")
    log = LossLog(config.output_dir, every_steps=config.log_every_steps, bar=bar)
    steps = 0
    for step, (pixels, captions) in zip(bar, batches, strict=False):
        if (rate := rates.at(step)) is None:
            break
        seen = preprocess(pixels.to(accelerator.device), size=config.resolution)
        ids = tokenize(tokenizer, captions).to(accelerator.device)
        with accelerator.autocast():
            images, texts, scale = model(seen, ids)
            loss = loss_of(images.float(), texts.float(), scale)
        update.step(loss, lr=rate)
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_SCALE)
        steps = step + 1
        log.add(steps, {"loss": loss.detach()})
    return steps


def _batches(folders: list[Folder], config: ClipConfig) -> DataLoader[tuple[Tensor, list[str]]]:
    pairs = Pairs(folders, config.resolution, config.min_crop, config.random_flip, config.seed)
    return DataLoader(  # of batches, which the collation makes of pairs
        pairs,  # type: ignore[arg-type]
        batch_sampler=DistinctCaptions(folders, config.batch_size, config.seed),
        collate_fn=collate_pairs,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _save(model: CLIP, tokenizer: CLIPTokenizer, output: Path, report: dict[str, float]) -> None:
    whole = clip_from_open_clip(model.cpu().float(), eos_token_id=tokenizer.eos_token_id)
    whole.save_pretrained(output / "clip")
    tokenizer.save_pretrained(output / "clip")
    text = text_encoder_from_open_clip(model, eos_token_id=tokenizer.eos_token_id)
    text.save_pretrained(output / "text_encoder")
    tokenizer.save_pretrained(output / "tokenizer")
    (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
