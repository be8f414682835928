"""Near-duplicates: equal files, and the same image in another size, format or quality."""

from pathlib import Path

import numpy as np
import pytest
from fakes_data import noise_image, save_image
from PIL import Image, ImageEnhance

from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.inspection import near_duplicates
from latentdiff.data.inspection.near_duplicates import (
    DuplicateGroup,
    find_near_duplicates,
    perceptual_hash,
)


def folder_of(root: Path) -> Folder:
    return read_folder(root, missing_caption="empty", max_aspect=1000)


def duplicates(root: Path, **settings) -> list[tuple[bool, list[str]]]:
    folder = folder_of(root)
    groups = find_near_duplicates(folder, **settings)
    return [(group.is_exact, [folder[i].id for i in group.indices]) for group in groups]


def textured(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((240, 180), Image.Resampling.BICUBIC)


def test_the_same_image_is_found_in_another_size_and_format(tmp_path):
    original = textured(0)
    original.save(tmp_path / "a.png")
    original.save(tmp_path / "b.jpg", quality=40)
    original.resize((120, 90)).save(tmp_path / "c.webp")
    ImageEnhance.Brightness(original).enhance(1.03).save(tmp_path / "d.png")
    textured(1).save(tmp_path / "e.png")
    assert duplicates(tmp_path) == [(False, ["a.png", "b.jpg", "c.webp", "d.png"])]


def test_equal_files_are_one_group_and_near_ones_another(tmp_path):
    textured(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    textured(0).save(tmp_path / "c.jpg")
    assert duplicates(tmp_path) == [(True, ["a.png", "b.png"]), (False, ["a.png", "c.jpg"])]


def test_the_same_shape_in_another_colour_is_another_image(tmp_path):
    for name, order in [("a.png", (0, 1, 2)), ("b.png", (2, 0, 1))]:
        bands = noise_image(3, width=64, height=64).split()
        Image.merge("RGB", [bands[i] for i in order]).save(tmp_path / name)
    assert duplicates(tmp_path) == []


def test_flat_images_are_duplicates_only_in_the_same_colour(tmp_path):
    for name, colour in [("a", (200, 0, 0)), ("b", (0, 0, 200)), ("c", (201, 0, 0))]:
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    assert duplicates(tmp_path) == [(False, ["a.png", "c.png"])]


def test_no_group_among_different_images_and_none_at_all(tmp_path):
    for i in range(30):
        textured(i).save(tmp_path / f"{i}.png")
    assert duplicates(tmp_path) == []
    assert find_near_duplicates(folder_of(tmp_path)[:0]) == []


def test_damaged_files_are_compared_by_their_bytes_alone(tmp_path):
    for i, name in enumerate(["a.png", "b.png", "c.png"]):
        save_image(tmp_path / name, i)
    folder = folder_of(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken since")
    assert find_near_duplicates(folder) == [DuplicateGroup((0, 1), True)]


def test_every_close_pair_is_found_as_by_brute_force():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for i in range(1, 200):  # flip up to six bits of a neighbour
        flips = rng.choice(64, int(rng.integers(0, 7)), replace=False).astype(np.uint64)
        hashes[i] = hashes[i - 1] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
    small = np.zeros((400, 192), np.uint8)
    found = {tuple(sorted(pair)) for pair in near_duplicates._close_pairs(hashes, small).tolist()}
    bits = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {(i, j) for i, j in zip(*np.nonzero(bits <= 4), strict=True) if i < j}
    assert found == expected
    assert len(expected) > 50


def test_chains_of_pairs_make_one_group():
    labels = near_duplicates._connect(np.array([[0, 1], [3, 4], [1, 2], [4, 0]]), num=6)
    assert near_duplicates._groups(labels) == [(0, 1, 2, 3, 4)]


def test_hashes_are_stored_in_the_index(tmp_path, monkeypatch):
    root = tmp_path / "data"
    root.mkdir()
    for i in range(3):
        textured(i).save(root / f"{i}.png")
    textured(0).save(root / "3.jpg")
    index = ScanIndex(tmp_path / "cache", root)
    first = duplicates(root, index=index)
    seen = []
    real = near_duplicates._hash_image
    monkeypatch.setattr(
        near_duplicates, "_hash_image", lambda data: seen.append(len(data)) or real(data)
    )
    assert duplicates(root, index=index) == first == [(False, ["0.png", "3.jpg"])]
    assert seen == []
    textured(9).save(root / "3.jpg")
    assert duplicates(root, index=index) == []
    assert seen == [(root / "3.jpg").stat().st_size]


def test_the_hash_of_an_image_and_of_its_negative_differ_everywhere():
    image = textured(5)
    negative = Image.fromarray(255 - np.asarray(image))
    differing = (perceptual_hash(image) ^ perceptual_hash(negative)).bit_count()
    assert differing >= 60


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2)])
def test_tiny_and_thin_images_have_hashes_too(tmp_path, size):
    Image.new("RGB", size, (5, 5, 5)).save(tmp_path / "a.png")
    Image.new("RGB", size, (5, 5, 5)).save(tmp_path / "b.bmp")
    assert find_near_duplicates(folder_of(tmp_path)) == [DuplicateGroup((0, 1), False)]
