"""A tiny VAE: that it learns another's latents, resumes exactly, and opens in stock diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from latentdiff.config.vae import VaeConfig
from latentdiff.models.build import build_tiny_vae
from latentdiff.models.components import choose_vae, load_vae
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import resolve_model
from latentdiff.training.vae.tiny import FrozenPosterior, encode_both, paired_figures
from latentdiff.training.vae.train_vae import train_vae

MODEL = "latentdiff-mini"
SETTINGS = {
    "pretrained": MODEL,
    "resolution": 32,
    "train_part": "decoder",
    "decoder": "tiny",
    "decoder_width": 16,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "lr_warmup_steps": 5,
    "ema_decay": 0.9,
    "mixed_precision": "fp32",
    "num_workers": 0,
    "log_every_steps": 10,
    "max_steps": 80,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-coloured images, some of them held out."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        (root / "images" / split).mkdir(parents=True)
        for k in range(count):
            pixels = np.empty((32, 32, 3), np.uint8)
            pixels[:16], pixels[16:] = rng.integers(0, 255, (2, 3))
            Image.fromarray(pixels).save(root / "images" / split / f"{k}.png")
    return root


def train(world: Path, run: Path, **changed: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = SETTINGS | {"roots": (str(world / "images"),), "output_dir": str(run)} | changed
    return train_vae(VaeConfig(**settings))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run that nothing stopped."""
    assert train(world, world / "run", checkpoint_every_steps=40) == 0
    return world / "run"


def test_a_tiny_vae_has_the_shapes_of_the_one_it_learns() -> None:
    for factor in (1, 2, 8):
        tiny = build_tiny_vae(factor=factor, latent_channels=5, width=4)
        codec, pixels = LatentCodec(tiny), torch.zeros(2, 3, 16, 24)
        z = codec.encode(pixels)
        assert (codec.factor, codec.scale, codec.shift) == (factor, 1.0, 0.0)
        assert z.shape == (2, 5, 16 // factor, 24 // factor)
        assert codec.decode(z).shape == pixels.shape


def test_at_full_width_it_has_the_layout_of_the_known_taesd() -> None:
    ours, stock = build_tiny_vae(factor=8, latent_channels=4), AutoencoderTiny()
    shapes = [{k: v.shape for k, v in one.state_dict().items()} for one in (ours, stock)]
    assert shapes[0] == shapes[1]
    hidden = "_use_default_values"
    assert {**ours.config, hidden: None} == {**stock.config, hidden: None}


def test_what_it_learns_is_the_scaled_posterior() -> None:
    codec, tiny = LatentCodec(load_vae(MODEL)), build_tiny_vae(factor=8, latent_channels=4, width=4)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    posterior = encode_both(tiny, codec, pixels)
    with torch.no_grad():
        mean, std = codec.moments(pixels)
    assert torch.equal(posterior.mean, mean)
    z = torch.stack([posterior.sample() for _ in range(1000)])
    torch.testing.assert_close((z.mean(0) - mean) / std, torch.zeros_like(std), atol=0.15, rtol=0)
    torch.testing.assert_close(z.std(0) / std, torch.ones_like(std), atol=0.12, rtol=0)


def test_what_it_learns_is_not_rounded_by_mixed_precision() -> None:
    codec, tiny = LatentCodec(load_vae(MODEL)), build_tiny_vae(factor=8, latent_channels=4, width=4)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, std = codec.moments(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        posterior = encode_both(tiny, codec, pixels)
    assert torch.equal(posterior.mean, mean)
    assert torch.equal(posterior.std, std)
    assert posterior.tiny.dtype == torch.bfloat16


def test_the_encoder_is_taught_the_mean_alone() -> None:
    mean, std = torch.randn(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    assert FrozenPosterior(mean, std, mean).kl().tolist() == [0, 0]
    assert FrozenPosterior(mean, 5 * std, mean + 2).kl().tolist() == pytest.approx([2, 2])


def test_paired_figures_of_known_errors() -> None:
    pixels = torch.zeros(4, 3, 8, 8)
    figures = paired_figures(pixels + 0.2, pixels + 0.02, pixels)  # 20 and 40 dB
    assert figures["psnr_db_lost"] == pytest.approx(20, abs=1e-3)
    assert figures["psnr_db_to_full"] == pytest.approx(10 * np.log10(4 / 0.18**2), abs=1e-3)
    assert figures["psnr_db_lost_low"] <= 20.001


def test_it_learns_and_the_report_sets_it_beside_the_full_decoder(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["latent_loss"] < 0.9 * lines[0]["latent_loss"]
    report = json.loads((whole / "metrics.json").read_text())
    found = {name.removesuffix("/images"): value for name, value in report.items()}
    assert found["psnr_db_low"] <= found["psnr_db"] <= found["psnr_db_high"]
    assert 12 < found["psnr_db"] < found["full_psnr_db"]
    lost = found["full_psnr_db"] - found["psnr_db"]
    assert found["psnr_db_lost"] == pytest.approx(lost, abs=1e-3)
    assert found["psnr_db_lost_low"] <= found["psnr_db_lost"] <= found["psnr_db_lost_high"]
    assert found["psnr_db_lost_low"] > 0
    assert found["decode_ms"] > 0 < found["full_decode_ms"]
    assert 0 < found["latent_error"] < 1
    with Image.open(whole / "reconstructions_images.png") as sheet:
        assert sheet.size == (8 * 32, 2 * 3 * 32)  # each above both decoders' images


def test_stock_diffusers_decodes_and_encodes_the_models_latents_by_it(
    world: Path, whole: Path
) -> None:
    """As its pipelines do: decode(z / scaling_factor), and encode(pixels) * scaling_factor."""
    tiny = AutoencoderTiny.from_pretrained(whole / "vae_tiny")
    full = AutoencoderKL.from_pretrained(resolve_model(MODEL), subfolder="vae")
    images = [np.array(Image.open(path)) for path in (world / "images" / "test").iterdir()]
    pixels = torch.from_numpy(np.stack(images)).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        z = full.encode(pixels).latent_dist.mean * full.config.scaling_factor
        decoded = tiny.decode(z / tiny.config.scaling_factor).sample
        encoded = tiny.encode(pixels).latents * tiny.config.scaling_factor
    assert (decoded - pixels).square().mean() < 0.4 * pixels.square().mean()
    assert (encoded - z).square().mean() < 0.9 * z.var()
    torch.testing.assert_close(LatentCodec(tiny).decode(z), decoded)


def test_a_resumed_run_is_the_whole_one_bit_for_bit(world: Path, whole: Path) -> None:
    start = whole / "checkpoints" / "step-000000040"
    assert train(world, world / "again", resume=str(start)) == 0
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        path = Path("vae_tiny") / name
        assert (world / "again" / path).read_bytes() == (whole / path).read_bytes()


def test_a_discriminator_and_augmentation_teach_it_too(world: Path) -> None:
    changed = {"discriminator_weight": 0.1, "discriminator_start": 1, "discriminator_width": 4}
    others = {"max_steps": 3, "log_every_steps": 1, "equivariance_prob": 1.0, "latent_noise": 0.2}
    assert train(world, world / "adversarial", **changed, **others) == 0
    lines = (world / "adversarial" / "metrics.jsonl").read_text().splitlines()
    assert "generator_loss" in json.loads(lines[-1])


def test_a_model_carries_it_or_says_how_to_train_one(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-vae --train_part=decoder --decoder=tiny"):
        choose_vae(MODEL, "tiny")
    with pytest.raises(FileNotFoundError, match=r"there is no folder \./nowhere"):
        choose_vae(MODEL, "./nowhere")
    of_run = choose_vae(MODEL, str(whole))
    assert isinstance(of_run, AutoencoderTiny)
    model = shutil.copytree(resolve_model(MODEL), tmp_path / "model")
    shutil.copytree(whole / "vae_tiny", model / "vae_tiny")
    carried = choose_vae(model, "tiny").state_dict()
    assert all(torch.equal(carried[name], value) for name, value in of_run.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"train_part": "all"}, "decoder=tiny has no effect: it needs --train_part=decoder"),
        ({"pca_channels": 2}, "a tiny decoder keeps the latents"),
        ({"decoder": "full"}, "decoder_width=16 has no effect"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(
    world: Path, changed: dict[str, object], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        train(world, world / "refused", **changed)
