"""The data of a run: broken files stop it or are skipped before any weight is loaded, turned images
come upright, and shards give what folders give."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes_data import captioned_folder, noise_image
from fakes_models import make_vae
from PIL import Image

from latentdiff.config.data import DataConfig
from latentdiff.config.model import ModelConfig
from latentdiff.config.text_to_image import Config
from latentdiff.data.cache.latent_cache import LatentCache
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.folder.folder import read_folder
from latentdiff.models.latents import LatentCodec
from latentdiff.program import program
from latentdiff.training.inputs.encode import bucket_ids, bucket_sizes, crop_plan
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.text_to_image.train_t2i import train


def settings(root: Path, **others: object) -> DataConfig:
    given = {
        "root": str(root),
        "cache_dir": f"{root}-cache",
        "resolution": 32,
        "heldout_fraction": 0,
    }
    return DataConfig(**{**given, "bucket_multiple": 8, "min_size": 8, **others})


def test_broken_images_stop_a_run_or_are_skipped_by_policy(tmp_path):
    root = captioned_folder(tmp_path / "data", 10)
    whole = (root / "3.png").read_bytes()
    (root / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "7.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 10 images \(20\.0%\)") as error:
        read_data(settings(root))
    for message in (
        "3.png",
        "empty file",
        "7.png",
        "data.max_invalid_fraction=0.02",
        f"{program()} inspect",
    ):
        assert message in str(error.value)
    left, _ = read_data(settings(root, max_invalid_fraction=0.2))
    assert len(left) == 8
    assert (root / "3.png").read_bytes() == whole[: len(whole) // 2], "never changed"


def test_a_folder_that_cannot_be_used_stops_before_any_weight(tmp_path, monkeypatch):
    root = captioned_folder(tmp_path / "data", 3)
    with (root / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "gone.png", "text": "x"}\n')
    make_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(
        "latentdiff.training.text_to_image.setup.load_vae_of",
        lambda config: pytest.fail("a weight was loaded"),
    )
    model = ModelConfig(vae=str(tmp_path / "vae"))
    config = Config(output_dir=str(tmp_path / "run"), data=settings(root), model=model)
    with pytest.raises(ValueError, match=r"metadata\.jsonl:4: gone\.png"):
        train(config)


def test_a_turned_image_is_upright_before_its_bucket_is_chosen(tmp_path):
    upright = noise_image(1, width=20, height=36)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it
    root = captioned_folder(tmp_path / "data", 2)
    upright.save(root / "0.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "1.png", exif=exif)
    data = settings(root, buckets=True)
    folder, _ = read_data(data)
    chosen = bucket_ids(folder, data)
    assert [str(bucket_sizes(data)[place]) for place in chosen] == ["24 x 40", "24 x 40"]
    encoder = OnlineLatentEncoder(folder, LatentCodec(make_vae()), plan=crop_plan(folder, data))
    cuts = [encoder.images.pixels(i, flipped=False, crop=0.5) for i in range(2)]
    assert cuts[0].shape == (40, 24, 3)
    assert torch.equal(*cuts)


def test_shards_are_cached_as_the_folder_of_their_members(tmp_path):
    root = captioned_folder(tmp_path / "loose", 5)
    (tmp_path / "sharded").mkdir()
    with tarfile.open(tmp_path / "sharded" / "a.tar", "w") as tar:
        for i in range(5):
            for name, content in (
                (f"{i}.png", (root / f"{i}.png").read_bytes()),
                (f"{i}.txt", f"image {i}".encode()),
                (f"{i}.pickle", b"\x80\x04never read."),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    codec, caches = LatentCodec(make_vae()), []
    for folder in (read_folder(root), read_folder(tmp_path / "sharded")):
        data = settings(tmp_path)
        caches.append(
            LatentCache.build(
                folder,
                codec,
                cache_dir=tmp_path / "cache",
                plan=crop_plan(folder, data),
                progress=False,
            )
        )
    assert [cache.num_encoded for cache in caches] == [5, 0]
    np.testing.assert_array_equal(caches[0].keys, caches[1].keys)


def test_every_image_of_a_large_folder_has_a_bucket_it_fits(tmp_path):
    data = settings(tmp_path, resolution=512, bucket_multiple=64, buckets=True)

    class Sizes:
        rng = np.random.default_rng(0)
        widths, heights = rng.integers(32, 3000, (2, 5000)).astype(np.int32)

        def __len__(self) -> int:
            return 5000

    plan = crop_plan(Sizes(), data)
    assert (plan.sizes % 64 == 0).all()
    assert (plan.sizes.prod(axis=1) <= 512 * 512).all()
    scale = np.maximum(plan.sizes[:, 0] / Sizes.heights, plan.sizes[:, 1] / Sizes.widths)
    exact = np.isclose(Sizes.heights * scale, plan.sizes[:, 0], atol=0.4)
    exact &= np.isclose(Sizes.widths * scale, plan.sizes[:, 1], atol=0.4)
    assert not plan.has_room[exact].any()
    assert plan.has_room[~exact].mean() > 0.9
