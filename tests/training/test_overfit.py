"""The whole way learns: two captions, two images, and each caption gives its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from latentdiff import LatentDiffPipeline
from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.data.shapes import Scene, render
from latentdiff.training.text_to_image.train_t2i import train

SCENES = (
    Scene("circle", "red", "large", "white"),
    Scene("square", "blue", "large", "black"),
)
COPIES = 6


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.slow
def test_two_captions_give_each_its_own_image(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "data"
    folder.mkdir()
    originals = []
    for index, scene in enumerate(SCENES):
        image = render(scene, np.random.default_rng(index), size_px=64)
        for copy in range(COPIES):  # so that a step sees each image at several timesteps
            image.save(folder / f"{index}-{copy}.png")
            (folder / f"{index}-{copy}.txt").write_text(scene.caption)
        originals.append(image)
    config = parse_arguments(
        Config,
        [
            f"--output_dir={tmp_path / 'run'}",
            f"--data.root={folder}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            "--data.resolution=64",
            "--data.heldout_fraction=0",
            "--model.vae=latentdiff-vae",
            "--model.unet.block_out_channels=[64,64]",
            "--model.unet.attention_levels=[true,true]",
            "--model.unet.layers_per_block=1",
            "--model.unet.head_dim=32",
            "--model.text.width=64",
            "--model.text.num_layers=1",
            "--model.text.num_heads=2",
            "--model.text.vocab_size=560",
            "--model.text.max_tokens=16",
            "--diffusion.prediction_type=v_prediction",
            "--diffusion.zero_terminal_snr=true",
            "--diffusion.timestep_sampling=stratified",
            "--train.max_steps=160",
            f"--train.batch_size={2 * COPIES}",
            "--train.learning_rate=3e-3",
            "--train.lr_schedule=cosine",
            "--train.lr_warmup_steps=20",
            "--train.ema_decay=0.98",
            "--train.mixed_precision=fp32",
            "--train.log_every_steps=50",
            "--preview.every_steps=0",
            "--preview.num_steps=1",
        ],
    )
    assert train(config) == 0
    pipeline = LatentDiffPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    images = pipeline(
        [scene.caption for scene in SCENES],
        num_inference_steps=25,
        guidance_scale=1.0,
        seed=0,
    ).images
    assert torch.isfinite(torch.tensor(np.asarray(images[0]).astype(float))).all()
    for own, other in ((0, 1), (1, 0)):
        assert psnr(images[own], originals[own]) > 20
        assert psnr(images[own], originals[other]) < 15
