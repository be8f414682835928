"""Masks: what can be wrong with them, that they go the way of their images, and what they do to
the loss."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes_data import captioned_folder, noise_image
from fakes_models import make_vae
from fakes_training import make_config, make_world, read_metrics
from PIL import Image

from latentdiff.config.data import DataConfig
from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.decode_ahead import CropPlan, load_item
from latentdiff.data.cache.latent_cache import LatentCache
from latentdiff.data.cache.mask_cache import MaskCache
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.masks import Masks
from latentdiff.diffusion.timesteps import SamplingOptions, build_timestep_sampler
from latentdiff.models.build import make_ddpm_scheduler, schedule_of
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.training.text_to_image.objective import Objective
from latentdiff.training.text_to_image.train_t2i import train

FACTOR = 4


def masked_folder(root: Path, num: int = 5) -> Path:
    """Images whose masks are their own grey values."""
    captioned_folder(root, num)
    for i in range(num):
        noise_image(i).convert("L").save(root / f"{i}.mask.png")
    return root


def square(folder: Folder, **settings) -> CropPlan:
    return CropPlan(np.full((len(folder), 2), 32, np.int32), **settings)


def by_reason(folder: Folder) -> dict[str, list[str]]:
    return {key: [name for name, _ in group.examples] for key, group in folder.problems.items()}


def test_bad_masks_are_named_and_their_images_skipped(tmp_path: Path) -> None:
    root = masked_folder(tmp_path / "data", 6)
    (root / "1.mask.png").unlink()
    (root / "2.mask.png").write_bytes((root / "2.mask.png").read_bytes()[:60])
    noise_image(3, width=41).convert("L").save(root / "3.mask.png")
    noise_image(0).save(root / "gone.mask.png")
    folder = read_folder(root, mask="file")
    assert [record.id for record in folder] == ["0.png", "4.png", "5.png"]
    assert by_reason(folder) == {
        "no_mask": ["1.png"],
        "broken_mask": ["2.mask.png"],
        "mask_size": ["3.mask.png"],
        "stray_mask": ["gone.mask.png"],
    }
    assert "41 x 32, its image 40 x 32" in folder.problems["mask_size"].line()
    assert folder.invalid_fraction == 0.5
    with pytest.raises(ValueError, match="image without a mask"):
        folder.check()


def test_a_folder_without_any_mask_is_reported(tmp_path: Path) -> None:
    folder = read_folder(captioned_folder(tmp_path / "data", 3), mask="file")
    assert not len(folder)
    with pytest.raises(ValueError, match=r"image without a mask \(3\).*NAME\.mask\.png"):
        folder.check()


def test_masks_are_no_images_where_they_are_not_used(tmp_path: Path) -> None:
    root = masked_folder(tmp_path / "data", 3)
    for i in range(3):
        (root / f"{i}.mask.txt").write_text("a mask")
    noise_image(9).save(root / "face.mask.png")  # of no image, so an image
    (root / "metadata.jsonl").unlink()
    for name in ("0", "1", "2", "face.mask"):
        (root / f"{name}.txt").write_text("a caption")
    folder = read_folder(root)
    assert [record.id for record in folder] == ["0.png", "1.png", "2.png", "face.mask.png"]
    assert by_reason(folder)["unused_mask"] == ["0.mask.png", "1.mask.png", "2.mask.png"]


def test_an_index_knows_masks_and_sees_one_change(tmp_path: Path) -> None:
    root, cache = masked_folder(tmp_path / "data", 4), tmp_path / "cache"
    assert len(read_folder(root, mask="file", cache_dir=cache)) == 4
    assert len(read_folder(root, mask="file", cache_dir=cache)) == 4
    (root / "2.mask.png").write_bytes(b"")
    assert len(read_folder(root, mask="file", cache_dir=cache)) == 3
    assert len(read_folder(root, cache_dir=cache)) == 4


@pytest.mark.parametrize("crop", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("flipped", [False, True])
def test_a_mask_is_cropped_and_mirrored_as_its_image(
    tmp_path: Path, crop: float, flipped: bool
) -> None:
    """Where nothing is resized, the mask's latent pixels are the image's, averaged."""
    folder = read_folder(masked_folder(tmp_path / "data"), mask="file")
    plan = square(folder, places=())
    mask = Masks(folder, plan, FACTOR, "file").mask(1, flipped=flipped, crop=crop)
    item = plan.item(1, u=crop, flip=flipped)
    grey = np.asarray(Image.fromarray(load_item(folder, item, digest=None)).convert("L"))
    expected = grey.reshape(8, FACTOR, 8, FACTOR).mean((1, 3)) / 255
    assert mask.shape == (1, 8, 8)
    np.testing.assert_allclose(mask[0], expected, atol=1e-6)


def test_a_resized_mask_keeps_its_place_and_its_area(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 1, width=128, height=128)
    mask = np.zeros((128, 128), np.uint8)
    mask[32:64, 64:96] = 255
    Image.fromarray(mask).save(root / "0.mask.png")
    folder = read_folder(root, mask="file")
    mask = Masks(folder, square(folder), FACTOR, "file").mask(0, flipped=False, crop=0.5)[0]
    assert float(mask.mean()) == pytest.approx(1 / 16, rel=0.02)
    assert (mask[2:4, 4:6] > 0.9).all()
    assert float(mask[:, :3].max()) == float(mask[5:].max()) == 0


def test_alpha_is_the_mask_and_opaque_where_there_is_none(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 3)
    grey = noise_image(0).convert("L")
    rgba = noise_image(0).convert("RGBA")
    rgba.putalpha(grey)
    rgba.save(root / "0.png")
    palette = noise_image(1).quantize(8)
    palette.info["transparency"] = palette.getpixel((20, 16))
    palette.save(root / "1.png", transparency=palette.info["transparency"])
    folder = read_folder(root)
    masks = Masks(folder, square(folder), FACTOR, "alpha")
    expected = np.asarray(grey.crop((4, 0, 36, 32))).reshape(8, 4, 8, 4).mean((1, 3)) / 255
    np.testing.assert_allclose(masks.mask(0, flipped=False, crop=0.5)[0], expected, atol=1e-6)
    assert 0 < float(masks.mask(1, flipped=False, crop=0.5).mean()) < 1
    assert (masks.mask(2, flipped=False, crop=0.5) == 1).all()


def test_a_rotated_image_and_its_upright_mask_agree(tmp_path: Path) -> None:
    root = captioned_folder(tmp_path / "data", 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = noise_image(0, width=32, height=40)
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "0.png", exif=exif)
    upright.convert("L").save(root / "0.mask.png")
    folder = read_folder(root, mask="file")
    mask = Masks(folder, square(folder), FACTOR, "file").mask(0, flipped=False, crop=0.5)[0]
    expected = np.asarray(upright.convert("L").crop((0, 4, 32, 36)))
    np.testing.assert_allclose(mask, expected.reshape(8, 4, 8, 4).mean((1, 3)) / 255, atol=1e-6)


def test_masks_in_shards_are_those_of_the_folder(tmp_path: Path) -> None:
    root = masked_folder(tmp_path / "loose", 3)
    (tmp_path / "sharded").mkdir()
    with tarfile.open(tmp_path / "sharded" / "a.tar", "w") as tar:
        for i in range(3):
            for name in (f"{i}.mask.png", f"{i}.png"):
                tar.add(root / name, name)
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = len(text := f"image {i}".encode())
            tar.addfile(info, io.BytesIO(text))
    folders = [read_folder(root, mask="file"), read_folder(tmp_path / "sharded", mask="file")]
    caches = [
        MaskCache.build(
            Masks(folder, square(folder), FACTOR, "file"), cache_dir=tmp_path / "c", progress=False
        )
        for folder in folders
    ]
    assert [cache.num_read for cache in caches] == [3, 0]
    assert np.array_equal(caches[0].keys, caches[1].keys)


@pytest.mark.parametrize("kind", ["file", "alpha"])
def test_cached_masks_equal_the_files_and_only_a_changed_one_is_read_again(
    tmp_path: Path, kind: str
) -> None:
    root, codec = masked_folder(tmp_path / "data", 4), LatentCodec(make_vae())

    def build() -> tuple[MaskCache, Masks, LatentCache]:
        folder = read_folder(root, mask="file")
        plan = square(folder, places=(0.0, 1.0))
        masks = Masks(folder, plan, FACTOR, kind)
        settings = {"cache_dir": tmp_path / "cache", "progress": False}
        cache = MaskCache.build(masks, **settings)
        return cache, masks, LatentCache.build(folder, codec, plan=plan, **settings)

    cache, masks, _ = build()
    assert cache.num_read == 8
    for crop in (0.1, 0.9):
        for flipped in (False, True):
            kept = cache.mask(2, flipped=flipped, crop=crop)
            u = 0.0 if crop < 0.5 else 0.5
            assert torch.equal(kept, masks.mask(2, flipped=flipped, crop=u))
    if kind == "alpha":
        return
    noise_image(7).convert("L").save(root / "2.mask.png")
    again, masks, latents = build()
    assert again.num_read == 2  # both places of the one image
    assert latents.num_encoded == 0
    assert torch.equal(again.mask(2, flipped=False, crop=0.0), masks.mask(2, flipped=False, crop=0))


def test_outside_the_mask_there_is_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 3, 4, 8, 8, generator=generator)
    mask = torch.zeros(3, 1, 8, 8)
    mask[0, :, 2:5, 1:7], mask[1] = 0.5, 1.0  # and a third that keeps nothing
    output = torch.zeros(3, 4, 8, 8, requires_grad=True)
    objective = Objective(
        schedule_of(make_ddpm_scheduler()),
        prediction_type="epsilon",
        null_text=Conditioning(torch.zeros(1, 2, 3)),
        sample_timesteps=build_timestep_sampler("uniform", SamplingOptions(1000)),
    )
    batch = {
        "z0": z0,
        "eps": eps,
        "mask": mask,
        "u": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
        "stratum": torch.arange(3),
        "prompt_embeds": torch.zeros(3, 2, 3),
        "dropped": torch.zeros(3, dtype=torch.bool),
    }
    losses = objective.losses(lambda zt, t, text: output, batch, count=3)
    losses.loss.sum().backward()
    assert output.grad is not None
    is_kept = mask.expand_as(z0) > 0
    assert (output.grad[~is_kept] == 0).all()
    assert (output.grad[is_kept] != 0).all()
    expected = eps[0, :, 2:5, 1:7].square().mean(), eps[1].square().mean(), torch.tensor(0.0)
    torch.testing.assert_close(losses.loss, torch.stack(expected))


def with_masks(world: Path, run: Path, **data) -> Config:
    return make_config(world, run, train__max_steps=2, **data)


def test_a_run_with_masks_is_the_same_with_and_without_the_cache(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    for place in sorted((world / "data").rglob("*.png")):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :16] = 255
        Image.fromarray(mask).save(place.with_suffix(".mask.png"))
    losses, gaps = [], []
    for name, cache in (("cached", True), ("uncached", False)):
        settings = {"data__mask": "file", "data__cache": cache, "data__random_flip": True}
        assert train(with_masks(world, tmp_path / name, **settings)) == 0
        losses.append(read_metrics(tmp_path / name))
        gaps.append(read_metrics(tmp_path / name, "heldout_gap")[2])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-5)
    assert train(with_masks(world, tmp_path / "plain", data__random_flip=True)) == 0
    assert read_metrics(tmp_path / "plain")[1] != pytest.approx(losses[0][1], rel=1e-3)


def test_alpha_where_nothing_is_transparent_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with pytest.raises(ValueError, match="no image has transparency"):
        train(with_masks(world, tmp_path / "run", data__mask="alpha"))


@pytest.mark.parametrize(
    "settings",
    [
        {"data": DataConfig(mask="file")},
        {"diffusion": DiffusionConfig(learned_variance=True, input_perturbation=0.1)},
    ],
)
def test_the_bound_has_no_masks_and_no_perturbation(settings: dict) -> None:
    with pytest.raises(ValueError, match="learned_variance"):
        Config(**{"diffusion": DiffusionConfig(learned_variance=True), **settings})
