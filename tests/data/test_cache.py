"""The cache encodes each image and caption once, ever, and never returns what is not right."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fakes_data import captioned_folder, noise_image, save_image
from fakes_icc import DISPLAY_P3, rgb_profile, srgb_profile
from fakes_models import CAPTIONS, make_text_encoder, make_tiny_vae, make_vae
from safetensors.torch import load_file

from latentdiff.data.cache import latent_cache as cache_module
from latentdiff.data.cache import tensor_store
from latentdiff.data.cache.decode_ahead import CropPlan
from latentdiff.data.cache.latent_cache import LatentCache, prune_cache, verify_cache
from latentdiff.data.cache.mask_cache import MaskCache
from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.data.cache.prompt_cache import PromptCache
from latentdiff.data.cache.shard_file import as_keys, key_of, read_shard, write_shard
from latentdiff.data.cache.tensor_store import StoreWriter, TensorStore
from latentdiff.data.folder import content_hash
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.data.masks import Masks
from latentdiff.image_io import load_image
from latentdiff.models.components import load_vae
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.text import TextEncoders, encode_text, tokenize, train_tokenizer


@pytest.fixture
def root(tmp_path) -> Path:
    return captioned_folder(tmp_path / "data", 9)


@pytest.fixture
def cache_dir(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def codec(vae) -> LatentCodec:
    return LatentCodec(vae)


def square(folder: Folder, side: int = 32, **settings) -> CropPlan:
    return CropPlan(np.full((len(folder), 2), side, np.int32), **settings)


def build(root: Path, codec: LatentCodec, cache_dir: Path, **settings) -> LatentCache:
    folder = read_folder(root)
    plan = settings.pop("plan", None) or square(folder)
    return LatentCache.build(
        folder, codec, cache_dir=cache_dir, plan=plan, progress=False, **settings
    )


def shards(cache_dir: Path, kind: str = "latents") -> list[Path]:
    return sorted((cache_dir / kind).glob("*.safetensors"))


def repaint(path: Path, seed: int) -> None:
    """Change an image's bytes, and its time, which some file systems count in coarse ticks."""
    before = path.stat().st_mtime_ns
    save_image(path, seed)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_only_images_whose_colors_are_converted_are_known_by_another_hash(root, cache_dir, codec):
    plain = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in root.glob("*.png")}
    profiles = {"1.png": rgb_profile(*DISPLAY_P3), "2.png": b"broken", "3.png": srgb_profile()}
    for name, profile in profiles.items():
        noise_image(50).save(root / name, icc_profile=profile)
    folder = read_folder(root)
    for record, digest in zip(folder, content_hash.image_hashes(folder), strict=True):
        content = (root / record.id).read_bytes()
        is_plain = digest.tobytes() == hashlib.sha256(content).digest()
        assert is_plain == (record.id != "1.png")
        assert record.id in profiles or plain[record.id] == digest.tobytes()
    cache = build(root, codec, cache_dir)
    assert verify_cache(cache, folder, codec=codec) < 1e-5
    counts = {key: group.count for key, group in folder.problems.items()}
    assert counts == {"color_profile": 1, "broken_profile": 1}
    assert "damaged color profile" in folder.problems["broken_profile"].line()


# what is kept


@pytest.mark.parametrize("make", [make_vae, make_tiny_vae])
def test_moments_are_those_of_the_images_encoded_alone(root, cache_dir, make):
    codec, folder = LatentCodec(make()), read_folder(root)
    sizes = np.array([[32, 32], [24, 40], [40, 24]] * 3, np.int32)
    plan = CropPlan(sizes, (0.0, 0.7), background=(9, 9, 9))
    cache = build(root, codec, cache_dir, plan=plan, flips=True, batch_size=2)
    assert len(cache) == 9
    assert cache.num_encoded == 36
    views = [(i, flip, place) for i in range(9) for flip in (False, True) for place in plan.places]
    for i, flip, place in views:
        height, width = sizes[i].tolist()
        cut = resize_and_crop(
            load_image(folder[i].path), height=height, width=width, crop=(place, place), flip=flip
        )
        with torch.no_grad():
            wanted = codec.moments(to_pixels(cut.image)[None])
        crop = 0.2 if place == plan.places[0] else 0.8
        for got, want in zip(cache.moments(i, flipped=flip, crop=crop), wanted, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want[0], atol=1e-5, rtol=1e-5)
        assert got.shape == cache.shape(i)
    assert verify_cache(cache, folder, codec=codec) < 1e-5


def test_another_scaling_is_followed_without_encoding(root, cache_dir, codec):
    cache = build(root, codec, cache_dir)
    raw = cache.raw_moments(0)
    codec.vae.register_to_config(scaling_factor=2.0, shift_factor=0.25)
    cache.use_scaling_of(codec)
    torch.testing.assert_close(cache.moments(0), ((raw[0] - 0.25) * 2.0, raw[1] * 2.0))
    assert build(root, codec, cache_dir).num_encoded == 0


def test_a_cache_goes_to_another_process(root, cache_dir, codec):
    cache = build(root, codec, cache_dir)
    cache.moments(0)
    copy = pickle.loads(pickle.dumps(cache))
    torch.testing.assert_close(copy.moments(3), cache.moments(3))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_is_another_cache_and_half_the_size(root, cache_dir, codec, dtype, error):
    full = build(root, codec, cache_dir)
    size = sum(path.stat().st_size for path in shards(cache_dir))
    half = build(root, codec, cache_dir, dtype=dtype)
    assert half.num_encoded == 9
    assert sum(path.stat().st_size for path in shards(cache_dir)) < 1.6 * size
    torch.testing.assert_close(half.moments(0), full.moments(0), atol=error, rtol=error)


def test_latents_that_are_not_finite_are_refused_by_name(root, cache_dir, codec):
    with torch.no_grad():
        codec.vae.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"not finite numbers for 0\.png"):
        build(root, codec, cache_dir)
    assert shards(cache_dir) == []


# what is encoded again


def test_images_without_room_are_cut_once(root, cache_dir, codec):
    has_room = np.arange(9) < 2
    plan = square(read_folder(root), places=(0.0, 0.5, 1.0), has_room=has_room)
    cache = build(root, codec, cache_dir, plan=plan)
    assert cache.num_encoded == 7 + 2 * 3
    for i in range(9):
        ends = [cache.raw_moments(i, crop=crop)[0] for crop in (0.0, 0.99)]
        assert torch.equal(*ends) != has_room[i]


def test_what_is_encoded_on_demand_is_what_is_kept(root, cache_dir, codec):
    folder = read_folder(root)
    plan = square(folder, places=(0.0, 1.0))
    cache = build(root, codec, cache_dir, plan=plan, flips=True)
    encoder = OnlineLatentEncoder(folder, codec, plan=plan)
    assert len(encoder) == 9
    noise = torch.randn(4, 8, 8)
    for i, flipped, crop in [(0, False, 0.1), (4, True, 0.9), (8, True, 0.2)]:
        kept = cache.inputs(i, noise, flipped=flipped, crop=crop)["z0"]
        inputs = encoder.images.inputs(i, noise, flipped=flipped, crop=crop)
        fresh = encoder.encode(inputs["pixels"][None], inputs["vae_noise"][None])[0]
        torch.testing.assert_close(fresh, kept, atol=1e-5, rtol=1e-5)
        for got, want in zip(
            encoder.raw_moments(i, flipped=flipped, crop=crop),
            cache.raw_moments(i, flipped=flipped, crop=crop),
            strict=True,
        ):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    anywhere = OnlineLatentEncoder(folder, codec, plan=square(folder, places=()))
    cuts = [anywhere.images.pixels(0, flipped=False, crop=crop) for crop in (0.0, 0.4, 0.99)]
    assert not torch.equal(cuts[0], cuts[1])
    assert not torch.equal(cuts[1], cuts[2])


@pytest.mark.parametrize("force_upcast", [True, False])
def test_images_are_encoded_in_float32_whatever_the_mixed_precision(
    root, cache_dir, codec, force_upcast
):
    codec.vae.register_to_config(force_upcast=force_upcast)
    encoder = OnlineLatentEncoder(read_folder(root), codec, plan=square(read_folder(root)))
    inputs = encoder.images.inputs(0, torch.zeros(4, 8, 8), flipped=False, crop=0.5)
    given = inputs["pixels"][None], inputs["vae_noise"][None]
    expected = encoder.encode(*given)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(encoder.encode(*given), expected)
        cache = build(root, codec, cache_dir)
    kept = cache.inputs(0, torch.zeros(4, 8, 8), flipped=False, crop=0.5)["z0"]
    torch.testing.assert_close(kept, expected[0], atol=1e-5, rtol=1e-5)


def test_opening_encodes_nothing(root, cache_dir, codec):
    folder = read_folder(root)
    settings = {"cache_dir": cache_dir, "plan": square(folder), "progress": False}
    assert LatentCache.open(folder, codec, **settings).num_missing == 9
    built = build(root, codec, cache_dir)
    opened = LatentCache.open(folder, codec, **settings)
    assert opened.num_missing == opened.num_encoded == 0
    assert torch.equal(opened.moments(3)[0], built.moments(3)[0])


def test_only_what_changed_is_encoded_again(root, cache_dir, codec):
    assert build(root, codec, cache_dir).num_encoded == 9
    assert build(root, codec, cache_dir).num_encoded == 0
    before = build(root, codec, cache_dir).moments(0)
    for i in (1, 4, 8):
        repaint(root / f"{i}.png", 100 + i)
    cache = build(root, codec, cache_dir)
    assert cache.num_encoded == 3
    torch.testing.assert_close(cache.moments(0), before, atol=0, rtol=0)
    assert verify_cache(cache, read_folder(root), codec=codec) < 1e-5


def test_moved_renamed_and_touched_files_are_known_by_content(root, cache_dir, codec, tmp_path):
    build(root, codec, cache_dir)
    moved = captioned_folder(tmp_path / "elsewhere", 9)
    os.utime(moved / "0.png", ns=(1, 1))
    assert build(moved, codec, cache_dir).num_encoded == 0


def test_equal_images_are_encoded_once(root, cache_dir, codec):
    for i in range(1, 9):
        (root / f"{i}.png").write_bytes((root / "0.png").read_bytes())
    assert build(root, codec, cache_dir, flips=True).num_encoded == 2


def test_one_changed_weight_encodes_all_again(root, cache_dir, codec):
    build(root, codec, cache_dir)
    with torch.no_grad():
        codec.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert build(root, codec, cache_dir).num_encoded == 9


@pytest.mark.parametrize("change", ["size", "crop", "background", "flips"])
def test_another_cut_is_encoded_and_the_first_stays(root, cache_dir, codec, change):
    folder = read_folder(root)
    build(root, codec, cache_dir)
    plans = {
        "size": square(folder, 24),
        "crop": square(folder, places=(0.0,)),
        "background": square(folder, background=(0, 0, 0)),
        "flips": square(folder),
    }
    settings = {"plan": plans[change], "flips": change == "flips"}
    assert build(root, codec, cache_dir, **settings).num_encoded == 9
    assert build(root, codec, cache_dir).num_encoded == 0


def test_unchanged_files_are_not_even_opened(root, cache_dir, codec, monkeypatch):
    folder = read_folder(root)
    LatentCache.build(folder, codec, cache_dir=cache_dir, plan=square(folder), progress=False)
    monkeypatch.setattr(content_hash, "read_entry", lambda *where: pytest.fail("opened an image"))
    monkeypatch.setattr(Folder, "read_bytes", lambda *where: pytest.fail("opened an image"))
    again = LatentCache.build(
        folder, codec, cache_dir=cache_dir, plan=square(folder), progress=False
    )
    assert again.num_encoded == 0


# faults


def test_an_interrupted_build_goes_on(root, cache_dir, codec, monkeypatch):
    calls = []

    def interrupted(codec, pixels, **settings):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return encode(codec, pixels, **settings)

    encode = cache_module.encode_moments
    monkeypatch.setattr(cache_module, "encode_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(root, codec, cache_dir, batch_size=2)
    monkeypatch.undo()
    assert build(root, codec, cache_dir, batch_size=2).num_encoded == 9 - 4


def test_an_image_that_breaks_late_is_named_and_the_others_kept(root, cache_dir, codec):
    folder = read_folder(root)
    path = root / "8.png"
    path.write_bytes(path.read_bytes()[:200])
    settings = {"cache_dir": cache_dir, "plan": square(folder), "progress": False}
    with pytest.raises(ValueError, match=r"8\.png cannot be encoded"):
        LatentCache.build(folder, codec, batch_size=2, **settings)
    save_image(path, 8)
    assert LatentCache.build(folder, codec, **settings).num_encoded == 1


def test_an_image_that_vanishes_is_named(root, cache_dir, codec, monkeypatch):
    folder = read_folder(root)

    def change(folder, **settings):
        found = image_digests(folder, **settings)
        (root / "3.png").unlink()
        return found

    image_digests = cache_module.image_hashes
    monkeypatch.setattr(cache_module, "image_hashes", change)
    with pytest.raises(ValueError, match=r"3\.png cannot be encoded"):
        LatentCache.build(folder, codec, cache_dir=cache_dir, plan=square(folder), progress=False)


def test_an_image_that_changes_meanwhile_is_not_kept_under_the_old_content(
    root, cache_dir, codec, monkeypatch
):
    image_digests = cache_module.image_hashes

    def change(folder, **settings):
        found = image_digests(folder, **settings)
        save_image(root / "0.png", 77)
        return found

    monkeypatch.setattr(cache_module, "image_hashes", change)
    with pytest.raises(ValueError, match=r"0\.png changes while it is encoded"):
        build(root, codec, cache_dir)


def damage_header(data: bytearray) -> bytes:
    data[30] ^= 1
    return bytes(data)


def damage_keys(data: bytearray) -> bytes:
    header = struct.unpack("<Q", data[:8])[0]
    low, _ = json.loads(data[8 : 8 + header])["keys"]["data_offsets"]
    data[8 + header + low] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        damage_header,
        damage_keys,
        lambda data: bytes(data[:-1]),
        lambda data: bytes(data) + b"x",
        lambda data: b"",
        lambda data: b"\xff" * len(data),
    ],
)
def test_a_damaged_shard_is_set_aside_said_and_encoded_again(
    root, cache_dir, codec, damage, caplog
):
    wanted = build(root, codec, cache_dir).moments(5)
    (path,) = shards(cache_dir)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    cache = build(root, codec, cache_dir)
    assert cache.num_encoded == 9
    assert f"{path} is damaged" in caplog.text
    torch.testing.assert_close(cache.moments(5), wanted)


def test_a_damaged_row_stops_the_reader_and_the_next_build_mends_it(root, cache_dir, codec):
    before = build(root, codec, cache_dir).moments(2)
    (path,) = shards(cache_dir)
    shard, _ = read_shard(path)
    data = bytearray(path.read_bytes())
    data[shard.start + 2 * shard.row_bytes + 5] ^= 1
    path.write_bytes(data)
    cache = build(root, codec, cache_dir)
    assert cache.num_encoded == 0  # rows are not read until they are wanted
    cache.moments(0)
    with pytest.raises(ValueError, match="another checksum"):
        cache.moments(2)
    rebuilt = build(root, codec, cache_dir)
    assert rebuilt.num_encoded == 9
    torch.testing.assert_close(rebuilt.moments(2), before)
    assert verify_cache(rebuilt, read_folder(root), codec=codec) < 1e-5


def test_check_rows_finds_and_mends_a_damaged_row_at_once(root, cache_dir, codec):
    build(root, codec, cache_dir)
    (path,) = shards(cache_dir)
    shard, _ = read_shard(path)
    data = bytearray(path.read_bytes())
    data[shard.start] ^= 1
    path.write_bytes(data)
    cache = build(root, codec, cache_dir, check_rows=True)
    assert cache.num_encoded == 9
    assert verify_cache(cache, read_folder(root), codec=codec) < 1e-5


def test_verify_sees_latents_of_other_weights(root, cache_dir, codec):
    cache = build(root, codec, cache_dir)
    with torch.no_grad():
        codec.vae.quant_conv.bias += 0.5
    assert verify_cache(cache, read_folder(root), codec=codec) > 0.1


def test_settings_that_do_not_fit_are_refused(root, cache_dir, codec):
    folder = read_folder(root)
    bad = [
        ({"plan": square(folder, 30)}, "multiples of 4"),
        ({"plan": CropPlan(np.zeros((3, 2), np.int32))}, "a row for each record"),
        ({"plan": square(folder, places=(1.5,))}, r"in \[0, 1\]"),
        ({"plan": square(folder, places=())}, "crops anywhere cannot be cached"),
        ({"shard": (2, 2)}, "rank < world"),
    ]
    for settings, message in bad:
        with pytest.raises(ValueError, match=message):
            build(root, codec, cache_dir, **settings)
    with pytest.raises(ValueError, match="flips=True"):
        build(root, codec, cache_dir).moments(0, flipped=True)


# several processes


def test_processes_share_the_work_and_find_each_others(root, cache_dir, codec):
    first = build(root, codec, cache_dir, shard=(0, 2), flips=True)
    assert 0 < first.num_encoded < 18
    assert first.num_missing == 18 - first.num_encoded
    other = int(np.flatnonzero(first._rows[0] < 0)[0])
    with pytest.raises(ValueError, match="not in the cache"):
        first.moments(other)
    second = build(root, codec, cache_dir, shard=(1, 2), flips=True)
    assert second.num_encoded == 18 - first.num_encoded
    assert first.num_missing == second.num_missing == 0
    torch.testing.assert_close(first.moments(other), second.moments(other))


def test_two_unshared_builds_at_once_leave_a_whole_cache(root, cache_dir, codec, monkeypatch):
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 1)
    counts = []

    def run() -> None:
        cache = build(root, codec, cache_dir, batch_size=1)
        counts.append((cache.num_encoded, cache.num_missing))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 3
    assert all(missing == 0 for _, missing in counts)
    assert sum(num_encoded for num_encoded, _ in counts) > 9  # they did overlap
    cache = build(root, codec, cache_dir)
    assert cache.num_encoded == 0
    assert verify_cache(cache, read_folder(root), codec=codec) < 1e-5


def test_a_build_that_is_killed_leaves_no_broken_shard(cache_dir, monkeypatch):
    keys, rows = as_keys([key_of(b"", b"a")]), torch.zeros(1, 3)
    monkeypatch.setattr(os, "replace", lambda *names: os._exit(9))
    pid = os.fork()
    if not pid:
        write_shard(cache_dir, keys, rows=rows)
        os._exit(0)
    os.waitpid(pid, 0)
    assert list(cache_dir.glob("*.safetensors")) == []
    assert len(list(cache_dir.glob("*.tmp"))) == 1
    assert len(TensorStore(cache_dir)) == 0


# the store


def test_rows_of_many_shapes_and_shards_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 4096)
    monkeypatch.setattr(tensor_store, "OPEN_SHARDS", 2)
    rng = np.random.default_rng(0)
    writer, wanted = StoreWriter(tmp_path), {}
    for i in range(300):
        shape = [(2, 3), (1, 5, 2), (7,)][int(rng.integers(3))]
        key, row = key_of(b"x", bytes([i % 256, i // 256])), torch.rand(1, *shape)
        writer.add(as_keys([key]), row)
        wanted[key] = row[0]
    writer.flush()
    store = TensorStore(tmp_path)
    assert len(store) == 300
    assert len(list(tmp_path.iterdir())) > 3
    for place in rng.permutation(300):
        key = list(wanted)[place]
        row = int(store.find(as_keys([key]))[0])
        assert torch.equal(store.read(row), wanted[key])
    assert store.find(as_keys([key_of(b"y", b"")])) == -1


def test_a_shard_is_a_plain_safetensors_file(root, cache_dir, codec):
    build(root, codec, cache_dir)
    (path,) = shards(cache_dir)
    assert load_file(path)["rows"].shape == (9, 2, 4, 8, 8)


def test_rows_read_by_threads_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_store, "OPEN_SHARDS", 1)
    for i in range(8):
        write_shard(
            tmp_path, as_keys([key_of(b"", bytes([i]))]), rows=torch.full((1, 64), float(i))
        )
    store, failures = TensorStore(tmp_path), []

    def read(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 8, 400).tolist():
            row = int(store.find(as_keys([key_of(b"", bytes([i]))]))[0])
            try:
                if store.read(row)[0] != i:
                    failures.append(i)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# prune


def test_prune_lists_what_nothing_uses_and_removes_it_only_when_told(root, cache_dir, codec):
    used = build(root, codec, cache_dir)
    (kept,) = shards(cache_dir)
    build(root, codec, cache_dir, plan=square(read_folder(root), 24))
    unused = [path for path in shards(cache_dir) if path != kept]
    (cache_dir / "latents" / "old.tmp").write_bytes(b"half")
    os.utime(cache_dir / "latents" / "old.tmp", (0, 0))
    (cache_dir / "latents" / "new.tmp").write_bytes(b"being written")
    wanted = [(path, path.stat().st_size) for path in unused]
    wanted.append((cache_dir / "latents" / "old.tmp", 4))
    assert prune_cache(cache_dir, [used.keys]) == wanted
    assert prune_cache(cache_dir, [used.keys], delete=True) == wanted
    assert sorted(p.name for p in (cache_dir / "latents").iterdir()) == [kept.name, "new.tmp"]
    assert build(root, codec, cache_dir).num_encoded == 0
    assert prune_cache(cache_dir / "nowhere", []) == []


# a full disk, and files of other content


def fill_disk(monkeypatch, *, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(tensor_store.shutil, "disk_usage", lambda path: usage)


def test_captions_that_do_not_fit_are_refused(cache_dir, tokenizer, text_encoder, monkeypatch):
    fill_disk(monkeypatch, free=1000)
    with pytest.raises(OSError, match=rf"{cache_dir}/text needs .* MB free; .*data\.cache_dir"):
        build_text(CAPTIONS, tokenizer, text_encoder, cache_dir)
    assert not any(cache_dir.rglob("*.safetensors"))


def test_what_does_not_fit_is_refused_before_encoding(root, cache_dir, codec, monkeypatch):
    monkeypatch.setattr(cache_module, "encode_moments", None)  # nothing is encoded
    row = 2 * codec.channels * (32 // codec.factor) ** 2 * 4
    fill_disk(monkeypatch, free=9 * row - 1)
    with pytest.raises(OSError, match=rf"{cache_dir}/latents needs .* MB free.*data\.cache=false"):
        build(root, codec, cache_dir)
    fill_disk(monkeypatch, free=1000)
    for i in range(9):
        noise_image(i).convert("L").save(root / f"{i}.mask.png")
    masked = read_folder(root, mask="file")
    masks = Masks(masked, square(masked), 4, "file")
    with pytest.raises(OSError, match=rf"{cache_dir}/masks needs .* MB free"):
        MaskCache.build(masks, cache_dir=cache_dir, progress=False)
    assert not any(cache_dir.rglob("*.safetensors"))


def test_the_estimate_is_what_is_written(root, cache_dir, codec, monkeypatch):
    row = 2 * codec.channels * (32 // codec.factor) ** 2 * 4
    fill_disk(monkeypatch, free=9 * row)
    assert build(root, codec, cache_dir).num_encoded == 9
    fill_disk(monkeypatch, free=0)
    assert build(root, codec, cache_dir).num_encoded == 0  # needs no room


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_is_one_message_and_what_was_written_stays(
    root, cache_dir, codec, monkeypatch, code
):
    calls = []

    def write(folder, keys, *, rows):
        calls.append(len(keys))
        if len(calls) == 3:
            raise OSError(code, os.strerror(code))
        return write_shard(folder, keys, rows=rows)

    monkeypatch.setattr(tensor_store, "SHARD_BYTES", 1)
    monkeypatch.setattr(tensor_store, "write_shard", write)
    with pytest.raises(
        OSError, match=rf"{cache_dir}/latents has no room for .*stays usable"
    ) as error:
        build(root, codec, cache_dir, batch_size=2)
    assert "data.cache_dir" in str(error.value)
    assert "[Errno" not in str(error.value)
    monkeypatch.undo()
    assert build(root, codec, cache_dir).num_encoded == 9 - 4


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: {},
        lambda header: {"rows": 3},
        lambda header: header | {"keys": header["keys"] | {"data_offsets": [-16, -8]}},
        lambda header: header | {"rows": header["rows"] | {"shape": [-1, 2]}},
        lambda header: header | {"rows": header["rows"] | {"dtype": "I64"}},
        lambda header: {k: v for k, v in header.items() if k != "checks"},
        lambda header: header | {"__metadata__": {}},
    ],
)
def test_a_header_of_other_content_is_a_damaged_shard(tmp_path, change):
    path = write_shard(tmp_path, as_keys([key_of(b"", b"x")]), rows=torch.zeros(1, 2))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    head = struct.pack("<Q", len(text)) + text
    forged = tmp_path / f"{hashlib.sha256(head).hexdigest()[:32]}.safetensors"
    forged.write_bytes(head + data[8 + length :])
    path.unlink()
    assert len(TensorStore(tmp_path)) == 0
    assert forged.with_suffix(".damaged").exists()


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"problems": "[]", "num_found": "1"},
        {"problems": "{", "num_found": "1"},
        {"problems": '{"nosuch": {"count": 1, "examples": []}}', "num_found": "1"},
        {"problems": '{"turned": 3}', "num_found": "1"},
        {"problems": "{}", "num_found": "many"},
        {"num_found": "1"},
    ],
)
def test_a_scan_index_of_other_content_is_made_anew(root, cache_dir, metadata):
    right = list(read_folder(root, cache_dir=cache_dir))
    (path,) = cache_dir.rglob("records-*.arrow")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().replace_schema_metadata(metadata)
    tmp = path.with_suffix(".new")
    with pa.OSFile(str(tmp), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    tmp.rename(path)
    assert list(read_folder(root, cache_dir=cache_dir)) == right


# text


def build_text(captions, tokenizer, text_encoder, cache_dir: Path, **settings) -> PromptCache:
    return PromptCache.build(
        captions,
        TextEncoders(text_encoder, tokenizer),
        cache_dir=cache_dir,
        progress=False,
        **settings,
    )


def test_prompt_embeds_are_those_of_the_text_encoder_null_caption_included(
    tokenizer, text_encoder, cache_dir
):
    cache = build_text(CAPTIONS * 3, tokenizer, text_encoder, cache_dir, batch_size=2)
    assert cache.num_encoded == len(cache) == len(CAPTIONS) + 1
    with torch.no_grad():
        wanted = encode_text(text_encoder, tokenize(tokenizer, [*CAPTIONS, ""]))
    got = torch.stack([cache.embeds(caption)["prompt_embeds"] for caption in (*CAPTIONS, "")])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'unheard of' is not in the cache"):
        cache.embeds("unheard of")


def test_only_new_captions_are_encoded(tokenizer, text_encoder, cache_dir):
    build_text(CAPTIONS, tokenizer, text_encoder, cache_dir)
    assert build_text(CAPTIONS, tokenizer, text_encoder, cache_dir).num_encoded == 0
    assert build_text([*CAPTIONS, "new"], tokenizer, text_encoder, cache_dir).num_encoded == 1
    copy = pickle.loads(pickle.dumps(build_text(CAPTIONS, tokenizer, text_encoder, cache_dir)))
    assert copy.embeds("")["prompt_embeds"].shape == (16, 16)


def test_another_text_encoder_or_tokenizer_encodes_all_captions(tokenizer, text_encoder, cache_dir):
    num = build_text(CAPTIONS, tokenizer, text_encoder, cache_dir).num_encoded
    tokenize(tokenizer, ["a call that sets padding"])
    tokenizer(["and one that does not"])
    assert build_text(CAPTIONS, tokenizer, text_encoder, cache_dir).num_encoded == 0
    other = train_tokenizer(CAPTIONS[:2], vocab_size=560, max_length=16)
    assert build_text(CAPTIONS, other, text_encoder, cache_dir).num_encoded == num
    torch.manual_seed(1)
    other_encoder = make_text_encoder(tokenizer)
    assert build_text(CAPTIONS, tokenizer, other_encoder, cache_dir).num_encoded == num


def test_captions_are_shared_out_and_interruption_keeps_what_was_done(
    tokenizer, text_encoder, cache_dir, monkeypatch
):
    captions = [f"image {i}" for i in range(20)]
    first = build_text(captions, tokenizer, text_encoder, cache_dir, shard=(0, 2))
    second = build_text(captions, tokenizer, text_encoder, cache_dir, shard=(1, 2))
    assert 0 < first.num_encoded < 21
    assert first.num_encoded + second.num_encoded == 21
    for caption in captions:
        assert torch.equal(
            first.embeds(caption)["prompt_embeds"], second.embeds(caption)["prompt_embeds"]
        )

    num_calls = 0

    def interrupted(conditioning: Conditioning) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return conditioning.prompt_embeds

    monkeypatch.setattr("latentdiff.data.cache.prompt_cache._rows_of", interrupted)
    others = [f"other {i}" for i in range(20)]
    with pytest.raises(KeyboardInterrupt):
        build_text(others, tokenizer, text_encoder, cache_dir, batch_size=4)
    assert len(TensorStore(cache_dir / "text")) == 21 + 2 * 4


# real images


def test_flowers_are_encoded_once_and_three_touched_ones_again(shared_dir, tmp_path):
    source = shared_dir / "data" / "flowers" / "train"
    if not source.is_dir():
        pytest.skip(f"needs {source}")
    names = sorted(path.name for path in source.glob("*.jpg"))[:40]
    for name in names:
        kind = tmp_path / "flowers" / name.split("_")[0]
        kind.mkdir(parents=True, exist_ok=True)
        (kind / name).write_bytes((source / name).read_bytes())
    codec = LatentCodec(load_vae(shared_dir / "weights" / "taesd"))

    def again() -> int:
        folder = read_folder(tmp_path / "flowers", caption_template="a photo of a {label}")
        cache = LatentCache.build(
            folder, codec, cache_dir=tmp_path / "cache", plan=square(folder, 64), progress=False
        )
        assert verify_cache(cache, folder, codec=codec, num_samples=3) < 1e-4
        return cache.num_encoded

    assert again() == len(names)
    assert again() == 0
    for path in sorted((tmp_path / "flowers").rglob("*.jpg"))[:3]:
        path.write_bytes(path.read_bytes() + b"\0")
    assert again() == 3
    with torch.no_grad():
        next(iter(codec.vae.parameters())).view(-1)[0] += 1e-3
    assert again() == len(names)
