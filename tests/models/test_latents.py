"""Latents: scale, shift, statistics and folding, for both classes of VAE and against stock
diffusers."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, VQModel
from fakes_models import make_tiny_vae, make_vae
from PIL import Image

from latentdiff.models.build import build_vae
from latentdiff.models.components import Components, load_vae
from latentdiff.models.latents import (
    LatentCodec,
    LatentStats,
    fold_normalisation,
    latent_stats,
    set_scalar_scaling,
)


def random_pixels(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, size, size) * 2 - 1


def without_quant_convs() -> AutoencoderKL:
    """A VAE like those of Stable Diffusion 3: no quant convolutions, and a shift."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.25,
    ).eval()


def randomise(vae: AutoencoderKL) -> AutoencoderKL:
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


@pytest.mark.parametrize("make", [make_vae, make_tiny_vae, without_quant_convs])
def test_codec_knows_factor_and_channels(make) -> None:
    vae = make()
    codec = LatentCodec(vae)
    z = codec.encode(random_pixels())
    assert z.shape == (2, codec.channels, 32 // codec.factor, 32 // codec.factor)
    assert codec.decode(z).shape == (2, 3, 32, 32)


def test_moments_of_kl_are_the_posterior_shifted_then_scaled() -> None:
    vae = randomise(without_quant_convs())
    pixels = random_pixels()
    mean, std = LatentCodec(vae).moments(pixels)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 1.5)
    torch.testing.assert_close(std, posterior.std * 1.5)


def test_encode_adds_eps_times_std_and_takes_the_mean_without_eps(vae) -> None:
    codec, pixels = LatentCodec(vae), random_pixels()
    mean, std = codec.moments(pixels)
    eps = torch.randn_like(mean)
    torch.testing.assert_close(codec.encode(pixels, eps), mean + std * eps)
    torch.testing.assert_close(codec.encode(pixels), mean)
    assert std.min() > 0


def test_tiny_vae_has_no_spread_and_is_not_quantised(tiny_vae) -> None:
    tiny_vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    codec, pixels = LatentCodec(tiny_vae), random_pixels()
    mean, std = codec.moments(pixels)
    raw = tiny_vae.encoder(pixels)
    torch.testing.assert_close(mean, (raw - 0.5) * 2)
    assert not std.any()
    torch.testing.assert_close(codec.decode(mean), tiny_vae.decoder(raw), atol=1e-5, rtol=1e-5)


def test_decode_equals_the_stock_pipeline_bit_for_bit(components: Components) -> None:
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    stock = StableDiffusionPipeline(
        unet=components.unet,
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        scheduler=components.scheduler,
        **parts,
    )
    stock.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a red circle",
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "latents": torch.randn(1, 4, 8, 8),
    }
    z = stock(**call, output_type="latent").images
    expected = stock(**call, output_type="pt").images
    with torch.no_grad():
        decoded = LatentCodec(components.vae).decode(z)
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), expected)


def test_decode_in_chunks_equals_decode_at_once(vae) -> None:
    codec, z = LatentCodec(vae), torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(codec.decode(z, chunk_size=2), codec.decode(z), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [make_vae, make_tiny_vae])
def test_gradients_flow_to_encoder_and_decoder(make) -> None:
    codec = LatentCodec(make())
    codec.decode(codec.encode(random_pixels())).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.vae.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_results_are_float32_and_close(dtype: torch.dtype) -> None:
    vae, pixels = make_vae(), random_pixels()
    with torch.no_grad():
        z = LatentCodec(vae).encode(pixels)
        expected = LatentCodec(vae).decode(z)
        codec = LatentCodec(vae.to(dtype))
        assert codec.encode(pixels).dtype == codec.decode(z).dtype == torch.float32
        torch.testing.assert_close(codec.encode(pixels), z, atol=0.05, rtol=0.05)
        torch.testing.assert_close(codec.decode(z), expected, atol=0.05, rtol=0.05)
    assert vae.dtype == dtype


def test_vae_that_overflows_in_float16_runs_in_float32_and_gets_its_dtype_back(vae) -> None:
    assert vae.config.force_upcast
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(1e4)  # 27 x 1e4 is beyond 65504
        vae.half()
        weight = vae.encoder.conv_in.weight.clone()
        white = torch.ones(1, 3, 32, 32)
        assert not vae.encode(white.half()).latent_dist.mean.isfinite().all()
        assert LatentCodec(vae).encode(white).isfinite().all()
    assert vae.dtype == torch.float16
    assert torch.equal(vae.encoder.conv_in.weight, weight)


def test_autocast_to_float16_leaves_such_a_vae_in_float32(vae) -> None:
    pixels = random_pixels()
    with torch.no_grad():
        expected = LatentCodec(vae).encode(pixels)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(LatentCodec(vae).encode(pixels), expected)
        vae.register_to_config(force_upcast=False)
        with torch.autocast("cpu", torch.float16):
            assert not torch.equal(LatentCodec(vae).encode(pixels), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_accelerate_streams_in_are_used(vae, dtype: torch.dtype) -> None:
    pixels = random_pixels()
    with torch.no_grad():
        z = LatentCodec(vae).encode(pixels)
        image = LatentCodec(vae).decode(z)
        cpu_offload(vae.to(dtype), execution_device=torch.device("cpu"))
        assert vae.encoder.conv_in.weight.is_meta
        torch.testing.assert_close(LatentCodec(vae).encode(pixels), z, atol=0.05, rtol=0.05)
        torch.testing.assert_close(LatentCodec(vae).decode(z), image, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 3, 32, 0)])
def test_pixels_of_another_shape_are_refused_by_shape(vae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        LatentCodec(vae).encode(torch.zeros(shape))


def test_latents_with_other_channels_and_other_vaes_are_refused(vae) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\), expected \(B, 4, h, w\)"):
        LatentCodec(vae).decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"eps has shape \(1, 4, 8, 8\), expected .*\(2, 4, 8, 8\)"
    ):
        LatentCodec(vae).encode(random_pixels(), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="VQModel"):
        LatentCodec(VQModel(block_out_channels=(8,), norm_num_groups=4))


def test_measured_statistics_are_those_of_sampled_latents() -> None:
    codec = LatentCodec(randomise(make_vae()))
    batches = [random_pixels(4), random_pixels(3, size=16)]
    with torch.no_grad():
        stats = latent_stats(codec, batches)
        samples = []
        for pixels in batches:
            mean, std = codec.raw_moments(pixels)
            sampled = mean + std * torch.randn(200, *mean.shape)  # (200, B, C, h, w)
            samples.append(sampled.movedim(2, 0).flatten(1))
    latents = torch.cat(samples, 1).double()
    assert stats.num_images == 7
    torch.testing.assert_close(torch.tensor(stats.mean), latents.mean(1).float(), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(stats.std), latents.std(1).float(), atol=0, rtol=0.02)
    assert stats.overall_std == pytest.approx(latents.std().item(), rel=0.01)
    assert stats.overall_mean == pytest.approx(latents.mean().item(), abs=0.02)


@pytest.mark.parametrize("make", [make_vae, make_tiny_vae])
def test_scalar_scaling_gives_unit_variance_and_survives_saving(make, tmp_path: Path) -> None:
    codec, pixels = LatentCodec(make()), random_pixels(4)
    set_scalar_scaling(codec.vae, latent_stats(codec, [pixels]))
    codec.vae.save_pretrained(tmp_path)
    again = LatentCodec(load_vae(tmp_path))
    assert again.scale == codec.scale
    assert again.shift == 0
    with torch.no_grad():
        mean, std = again.moments(pixels)
    variance = (mean.square() + std.square()).mean() - mean.mean().square()
    assert variance.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scaling_factor", [1.0, 0.18215])
@pytest.mark.parametrize("make", [make_vae, without_quant_convs])
def test_folded_normalisation_is_exact_and_decodes_in_stock(
    make, scaling_factor: float, tmp_path: Path
) -> None:
    vae, pixels = randomise(make()), random_pixels()
    mean, std = [0.5, -2.0, 0.0, 3.0], [0.5, 2.0, 1.0, 4.0]
    offset = torch.tensor(mean)[:, None, None]
    scale = torch.tensor(std)[:, None, None]
    with torch.no_grad():
        raw_mean, raw_std = LatentCodec(vae).raw_moments(pixels)
        image = vae.decode(raw_mean).sample
        fold_normalisation(vae, mean=mean, std=std, scaling_factor=scaling_factor)
        vae.save_pretrained(tmp_path)
        loaded = AutoencoderKL.from_pretrained(tmp_path)
        z_mean, z_std = LatentCodec(loaded).moments(pixels)
        torch.testing.assert_close(z_mean, (raw_mean - offset) / scale, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z_std, raw_std / scale, atol=1e-5, rtol=1e-5)
        ours = LatentCodec(loaded).decode(z_mean)
        stock = loaded.decode(z_mean / loaded.config.scaling_factor).sample
    assert torch.equal(ours, stock)
    torch.testing.assert_close(stock, image, atol=1e-5, rtol=1e-5)


def test_folding_a_shift_keeps_z_and_images() -> None:
    vae, pixels = randomise(without_quant_convs()), random_pixels()
    codec = LatentCodec(vae)
    with torch.no_grad():
        z = codec.encode(pixels)
        image = codec.decode(z)
        fold_normalisation(
            vae, mean=[codec.shift] * 4, std=[1 / codec.scale] * 4, scaling_factor=codec.scale
        )
        assert codec.shift == 0
        torch.testing.assert_close(codec.encode(pixels), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codec.decode(z), image, atol=1e-5, rtol=1e-5)


def test_measure_then_fold_gives_unit_channels() -> None:
    codec, pixels = LatentCodec(randomise(make_vae())), random_pixels(4)
    stats = latent_stats(codec, [pixels])
    fold_normalisation(codec.vae, mean=stats.mean, std=stats.std)
    after = latent_stats(codec, [pixels])
    torch.testing.assert_close(torch.tensor(after.mean), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(after.std), torch.ones(4), atol=1e-5, rtol=0)


def test_what_cannot_be_measured_or_folded_is_refused(vae, tiny_vae) -> None:
    constant = LatentStats((0.0,) * 4, (0.0,) * 4, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="no image"):
        latent_stats(LatentCodec(vae), [])
    with pytest.raises(ValueError, match="overall_std"):
        set_scalar_scaling(vae, constant)
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        fold_normalisation(tiny_vae, mean=[0.0] * 4, std=[1.0] * 4)
    with pytest.raises(ValueError, match="expected 4"):
        fold_normalisation(vae, mean=[0.0], std=[1.0])
    with pytest.raises(ValueError, match="finite numbers above 0"):
        fold_normalisation(vae, mean=[0.0] * 4, std=[1.0, 1.0, 0.0, 1.0])


def test_build_vae_starts_unscaled() -> None:
    codec = LatentCodec(build_vae(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1))
    assert (codec.factor, codec.scale, codec.shift) == (2, 1.0, 0.0)


def test_real_taesd_rebuilds_a_photograph_and_agrees_with_its_measured_statistics(
    shared_dir: Path,
) -> None:
    vae = load_vae(shared_dir / "weights" / "taesd")
    assert isinstance(vae, AutoencoderTiny)
    codec = LatentCodec(vae)
    files = sorted((shared_dir / "data" / "flowers" / "test").glob("*.jpg"))[:2]
    images = [Image.open(file).convert("RGB").resize((256, 256)) for file in files]
    pixels = torch.stack(
        [
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(256, 256, 3)
            for image in images
        ]
    ).permute(0, 3, 1, 2)
    pixels = pixels / 127.5 - 1
    with torch.no_grad():
        error = (codec.decode(codec.encode(pixels)).clamp(-1, 1) - pixels).square().mean()
    assert -10 * torch.log10(error / 4) > 22  # PSNR in dB
    known = json.loads((shared_dir / "weights" / "taesd" / "latent_stats.json").read_text())
    stats = latent_stats(codec, [pixels])
    assert stats.overall_std == pytest.approx(known["overall_std"], rel=0.3)
