"""The VAE recipe: its losses against closed forms and other implementations, and that it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from latentdiff.config.vae import VaeConfig
from latentdiff.evaluation.metrics.reconstruction import (
    channel_moments,
    psnr,
    reconstruction_sheet,
    ssim,
)
from latentdiff.models.build import build_vae
from latentdiff.training.vae.losses import (
    VGG_WIDTHS,
    Lpips,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    vae_loss,
)
from latentdiff.training.vae.pca import keep_principal
from latentdiff.training.vae.train_vae import train_vae
from latentdiff.training.vae.vae_step import add_noise, rot90, shift

SPEED = ("images_per_second", "data_wait", "memory_gb")
TINY = {
    "resolution": 32,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "batch_size": 8,
    "learning_rate": 4e-3,
    "lr_warmup_steps": 5,
    "ema_decay": 0.9,
    "mixed_precision": "fp32",
    "num_workers": 0,
    "log_every_steps": 5,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-coloured images, some of them held out."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        (root / split).mkdir()
        for k in range(count):
            pixels = np.empty((40, 40, 3), np.uint8)
            pixels[:20], pixels[20:] = rng.integers(0, 255, (2, 3))
            Image.fromarray(pixels).save(root / split / f"{k}.png")
    return root


def config(images: Path, output: Path, **changed: object) -> VaeConfig:
    """Return a tiny run's settings."""
    settings = TINY | {"output_dir": str(output), "roots": (str(images),)} | changed
    return VaeConfig(**settings)


def trained(config: VaeConfig) -> dict[str, float]:
    """Train to the end; return the figures."""
    assert train_vae(config) == 0
    figures: dict[str, float] = json.loads((Path(config.output_dir) / "metrics.json").read_text())
    return figures


def test_loss_is_l1_l2_and_kl() -> None:
    x, y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kl = torch.tensor([1.0, 3.0])
    expected = F.l1_loss(x, y) + 0.5 * F.mse_loss(x, y) + 0.1 * 2
    assert vae_loss(x, y, kl, l2_weight=0.5, kl_weight=0.1).item() == pytest.approx(expected.item())


def test_hinge_loss_is_zero_where_all_is_told_apart_and_one_where_nothing_is() -> None:
    assert hinge_loss(torch.tensor([1.5]), torch.tensor([-1.0])).item() == 0
    assert hinge_loss(torch.zeros(3), torch.zeros(3)).item() == 1


def test_adaptive_weight_makes_both_gradients_alike() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(8, 4)
    first, second = (x @ weight).square().mean(), 100 * (x @ weight).abs().mean()
    factor = adaptive_weight(first, second, weight)
    ours = torch.autograd.grad(first, weight, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(factor * second, weight)[0].norm()
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-3)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_discriminator_sees_patches_of_the_width_it_says(layers: int, patch: int) -> None:
    net = PatchDiscriminator(8, num_layers=layers)
    for layer in net.layers:  # norms look at the whole image
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # type: ignore[method-assign]
    pixels = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = net(pixels)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert pixels.grad is not None
    seen = (pixels.grad.abs().sum((0, 1)) > 0).any(0).sum().item()
    assert seen == patch


def test_lpips_equals_the_torchmetrics_one(tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    theirs = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, use_dropout=False).eval()
    with torch.no_grad():
        for head in (theirs.lin0, theirs.lin1, theirs.lin2, theirs.lin3, theirs.lin4):
            head.model[-1].weight.abs_()
    stored = {}
    for name, tensor in theirs.net.state_dict().items():  # "slice2.5.weight" of VGG16's layers
        stored["features." + name.split(".", 1)[1]] = tensor.clone()
    for k in range(5):
        stored[f"lin{k}.weight"] = getattr(theirs, f"lin{k}").model[-1].weight.detach().clone()
    save_file(stored, tmp_path / "lpips.safetensors")
    a, b = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs(a, b).flatten()
    torch.testing.assert_close(Lpips(tmp_path / "lpips.safetensors")(a, b), expected)


def test_lpips_names_what_a_file_lacks(tmp_path: Path) -> None:
    save_file(
        {"features.0.weight": torch.zeros(VGG_WIDTHS[0], 3, 3, 3)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match=r"features\.0\.bias"):
        Lpips(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="expected LPIPS weights"):
        Lpips(tmp_path / "b.safetensors")


def test_ssim_equals_the_torchmetrics_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 3, 3, 24, 30, generator=generator) * 2 - 1
    y = 0.7 * x + 0.3 * y
    _, everywhere = structural_similarity_index_measure(
        y, x, data_range=2.0, reduction="none", return_full_image=True
    )
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))  # theirs counts the mirrored border too
    torch.testing.assert_close(ssim(y, x), expected, atol=1e-5, rtol=1e-5)
    assert ssim(x, x).tolist() == pytest.approx([1.0] * 3)
    with pytest.raises(ValueError, match="11 a side"):
        ssim(x[..., :8], y[..., :8])


def test_psnr_of_a_known_error() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    assert psnr(pixels + 0.02, pixels).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)


def test_moments_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 2, 16, 16, generator=generator)
    z[:, 1] = 3 + 2 * torch.where(z[:, 1] > 0, 1.0, -1.0)  # two points: the minimum of kurtosis, -2
    normal, two_points = channel_moments(z)
    assert (normal.mean, normal.std, normal.kurtosis) == pytest.approx((0, 1, 0), abs=0.05)
    assert (two_points.mean, two_points.std) == pytest.approx((3, 2), abs=0.05)
    assert two_points.kurtosis == pytest.approx(-2, abs=0.01)


def test_turning_is_by_quarters() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert rot90(x, turns=1, mirrored=False)[0, 0, 0].tolist() == x[0, 0, :, 3].tolist()
    assert rot90(x, turns=0, mirrored=True)[0, 0, 0].tolist() == [3, 2, 1, 0]


def test_noise_before_decoding_is_of_a_strength_of_its_own_for_each_image() -> None:
    z = 1 + 3 * torch.randn(200, 4, 16, 16)
    assert torch.equal(add_noise(z, 0.0), z)
    added = add_noise(z, 0.5) - z
    strengths = added.std((1, 2, 3)) / z.std()
    assert strengths.max() < 0.5 * 1.1  # of 1,024 values, so known to 2 %
    assert strengths.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx(
        [0.05, 0.25, 0.45], abs=0.1
    )
    assert added.mean().abs() < 0.01 * z.std()


def test_latents_that_are_means_slide_as_their_images_do() -> None:
    ramp = torch.arange(32.0).view(1, 1, 1, 32).expand(1, 3, 32, 32)
    pixels = ramp + 5 * ramp.transpose(2, 3)
    z = F.avg_pool2d(pixels, 8)
    moved, cut = shift(z, pixels, down=3, right=6)
    assert cut.shape == (1, 3, 24, 24)
    torch.testing.assert_close(moved, F.avg_pool2d(cut, 8))


def test_a_sheet_has_each_image_above_its_reconstruction() -> None:
    pixels = torch.full((3, 3, 4, 4), -1.0)
    sheet = np.asarray(reconstruction_sheet(pixels, -pixels, columns=2))
    assert sheet.shape == (16, 8, 3)
    assert sheet[:4].max() == 0
    assert sheet[4:8].min() == 255
    assert sheet[8:12, 4:].min() == 255  # the empty place


@pytest.mark.parametrize("factor", [4, 8])
def test_learns_and_reports(images: Path, tmp_path: Path, factor: int) -> None:
    widths = (8, 16, 16) if factor == 4 else (8, 8, 16, 16)
    report = trained(
        config(
            images,
            tmp_path,
            block_out_channels=widths,
            max_steps=80,
            equivariance_prob=0.25,
            discriminator_weight=0.1,
            discriminator_start=60,
            discriminator_width=8,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert "discriminator_loss" not in lines[0]
    assert lines[-1]["discriminator_loss"] < 1.5
    name = images.name
    assert (
        report[f"psnr_db_low/{name}"] <= report[f"psnr_db/{name}"] <= report[f"psnr_db_high/{name}"]
    )
    assert 0 < report[f"ssim/{name}"] < 1
    assert report[f"num_images/{name}"] == 12
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    z = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode()
    assert z.shape[2] == 32 // factor
    assert vae.config["scaling_factor"] == pytest.approx(report["scaling_factor"])
    with Image.open(tmp_path / f"reconstructions_{name}.png") as sheet:
        assert sheet.size == (8 * 32, 4 * 32)


def test_scaled_gradients_of_fp16_teach_what_fp32_does(images: Path, tmp_path: Path) -> None:
    """On the CPU, where both compute in fp32: what differs is the scaling."""
    losses = {}
    for precision in ("fp32", "fp16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        trained(
            config(
                images,
                tmp_path / precision,
                mixed_precision=precision,
                max_steps=6,
                log_every_steps=1,
                latent_noise=0.1,
                discriminator_weight=0.1,
                discriminator_start=2,
                discriminator_width=8,
            )
        )
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[precision] = [row[name] for row in rows for name in row if name not in SPEED]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=1e-3, abs=1e-3)


def test_the_decoder_alone_keeps_the_latents(images: Path, tmp_path: Path) -> None:
    trained(config(images, tmp_path / "a", max_steps=5))
    first = AutoencoderKL.from_pretrained(tmp_path / "a" / "vae")
    further = config(
        images,
        tmp_path / "b",
        max_steps=5,
        pretrained=str(tmp_path / "a" / "vae"),
        train_part="decoder",
    )
    trained(further)
    second = AutoencoderKL.from_pretrained(tmp_path / "b" / "vae")
    old, new = first.state_dict(), second.state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert first.config["scaling_factor"] == second.config["scaling_factor"]


def test_the_decoder_alone_wants_a_vae_to_go_on_from(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need --pretrained"):
        train_vae(config(images, tmp_path, train_part="decoder"))


def test_principal_components_encode_exactly_and_decode_when_none_is_lost() -> None:
    torch.manual_seed(0)
    vae = build_vae(
        block_out_channels=(8, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    with torch.no_grad():  # one channel is a sum of two others
        vae.quant_conv.weight[3] = vae.quant_conv.weight[:2].sum(0)
        vae.quant_conv.bias[3] = 0.5
        pixels = torch.randn(6, 3, 16, 16)
        mean = vae.encode(pixels).latent_dist.mode().mean((0, 2, 3))
        after = vae.post_quant_conv  # the decoder's padding is then the mean, as it will be
        after.bias.copy_(-after.weight[:, :, 0, 0] @ mean)
    made = keep_principal(vae, [pixels[:3], pixels[3:]], 3).eval()
    with torch.no_grad():
        old, new = vae.encode(pixels).latent_dist.mode(), made.encode(pixels).latent_dist.mode()
        flat = new.transpose(0, 1).flatten(1)
        torch.testing.assert_close(torch.cov(flat), torch.eye(3), atol=1e-3, rtol=1e-3)
        theirs, ours = vae.decode(old).sample, made.decode(new).sample
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="fewer latent channels"):
        keep_principal(vae, [pixels], 4)


def test_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hold no training images"):
        train_vae(VaeConfig(output_dir=str(tmp_path)))
