"""Images to pixels: the geometry of resize and crop, and the range."""

import numpy as np
import pytest
import torch
from fakes_data import noise_image
from PIL import Image

from latentdiff.data.images import resize_and_crop, to_pixels


def array(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 16), (24, 64), (100, 100)])
def test_resize_equals_pillow_and_covers_the_size(height, width):
    image = noise_image(3, width=90, height=60)
    cut = resize_and_crop(image, height=height, width=width)
    assert cut.image.size == (width, height)
    scale = max(height / 60, width / 90)
    whole = image.resize((round(90 * scale), round(60 * scale)), Image.Resampling.BICUBIC)
    top, left = cut.top_left
    expected = whole.crop((left, top, left + width, top + height))
    np.testing.assert_array_equal(array(cut.image), array(expected))
    assert cut.original_size == (60, 90)


def test_resize_is_antialiased_as_torch_antialiases():
    image = noise_image(5, width=96, height=96)
    ours = to_pixels(resize_and_crop(image, height=24, width=24).image)
    theirs = torch.nn.functional.interpolate(
        to_pixels(image)[None], (24, 24), mode="bicubic", antialias=True
    )[0].clamp(-1, 1)
    assert (ours - theirs).abs().max() < 3 / 127.5


def test_an_image_of_the_wanted_size_is_left_as_it_is():
    image = noise_image()
    cut = resize_and_crop(image, height=32, width=40)
    np.testing.assert_array_equal(array(cut.image), array(image))
    assert cut.top_left == (0, 0)


@pytest.mark.parametrize(
    ("crop", "top_left"), [((0, 0), (0, 0)), ((0.5, 0.5), (0, 16)), ((1, 1), (0, 32))]
)
def test_crop_fractions_place_the_cut(crop, top_left):
    image = Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(32, 0)).convert("RGB")
    cut = resize_and_crop(image, height=32, width=32, crop=crop)
    assert cut.top_left == top_left
    assert array(cut.image)[0, 0, 0] == top_left[1]


def test_flip_mirrors_the_cut():
    image = noise_image(width=50, height=30)
    plain = resize_and_crop(image, height=20, width=20, crop=(0.2, 0.9))
    mirrored = resize_and_crop(image, height=20, width=20, crop=(0.2, 0.9), flip=True)
    np.testing.assert_array_equal(array(plain.image)[:, ::-1], array(mirrored.image))
    assert mirrored.flip
    assert not plain.flip


def test_a_crop_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match=r"crop must be \(y, x\) in \[0, 1\]"):
        resize_and_crop(noise_image(), height=8, width=8, crop=(0.0, 1.5))


def test_pixels_run_from_minus_one_to_one():
    image = Image.new("RGB", (5, 3), (0, 255, 127))
    pixels = to_pixels(image)
    assert pixels.shape == (3, 3, 5)
    assert pixels.dtype == torch.float32
    assert pixels[0].unique().tolist() == [-1.0]
    assert pixels[1].unique().tolist() == [1.0]
    assert abs(pixels[2].unique().item()) < 0.005


def test_pixels_want_rgb():
    with pytest.raises(ValueError, match="expected an RGB image, got mode L"):
        to_pixels(noise_image(mode="L"))
