"""Color profiles: every kind of profile in every format ends in the right sRGB values."""

import io
import logging
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from fakes_data import noise_image
from fakes_icc import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    cmyk_profile,
    grey_profile,
    rgb_profile,
    srgb_profile,
)
from PIL import Image, ImageCms

from latentdiff.icc import is_converted, profile_fault, to_srgb
from latentdiff.image_io import decode_image, load_image, load_mask, load_thumbnail, read_header
from latentdiff.pipeline.image_inputs import read_image_inputs

WIDE = {"P3": DISPLAY_P3, "Adobe RGB": ADOBE_RGB, "ProPhoto": PROPHOTO}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def smooth_image(mode: str = "RGB") -> Image.Image:
    """Blocks of 8 colors a channel, each flat, so that compression changes them little."""
    axis = np.linspace(20, 235, 4).astype(np.uint8)
    colors = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(8, 8, 3)
    return Image.fromarray(colors.repeat(16, 0).repeat(16, 1)).convert(mode)


def encoded(image: Image.Image, image_format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    lossless = {"quality": 100} | ({"lossless": True} if image_format == "WEBP" else {})
    subsampling = {"subsampling": "4:4:4"} if image_format in ("JPEG", "AVIF") else {}
    image.save(file, image_format, **(lossless | subsampling | options))
    file.seek(0)
    return file


def right(stored: Image.Image, profile: bytes) -> np.ndarray:
    """Give the sRGB values of stored values, by Little CMS."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(stored, source, SRGB, outputMode="RGB")
    return np.asarray(converted, int)


def difference(loaded: Image.Image, values: np.ndarray) -> int:
    return int(abs(np.asarray(loaded, int) - values).max())


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """Put chunks behind a PNG's header."""
    body = b"".join(
        struct.pack(">I4s", len(value), kind) + value + struct.pack(">I", zlib.crc32(kind + value))
        for kind, value in chunks
    )
    return io.BytesIO(data[:33] + body + data[33:])


def gama(gamma: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(gamma * 100_000))


def chrm(values: Sequence[float]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_profiles_become_srgb_in_each_format(name: str, image_format: str) -> None:
    profile = rgb_profile(*WIDE[name])
    file = encoded(smooth_image(), image_format, icc_profile=profile)
    stored = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    loaded = load_image(file)
    assert difference(loaded, right(stored, profile)) <= 2
    assert difference(loaded, np.asarray(stored, int)) > 10
    assert loaded.info.get("icc_profile") is None
    assert read_header(file).is_converted


def test_display_p3_is_right_by_its_own_equations() -> None:
    image = Image.new("RGB", (8, 8), (200, 60, 60))
    file = encoded(image, "PNG", icc_profile=rgb_profile(*DISPLAY_P3))
    assert difference(load_image(file), np.array([217, 42, 52])) <= 2


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("profile", [None, SRGB.tobytes()], ids=["none", "sRGB"])
def test_images_in_srgb_stay_bit_for_bit(profile: bytes | None, image_format: str) -> None:
    options = {} if profile is None else {"icc_profile": profile}
    file = encoded(noise_image(width=200, height=200), image_format, **options)
    assert difference(load_image(file), np.asarray(Image.open(file), int)) == 0
    assert not read_header(file).is_converted


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.2])
def test_grey_profiles_become_srgb(gamma: float, image_format: str) -> None:
    profile = grey_profile(gamma)
    stored = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(8, 0))
    file = encoded(stored, image_format, icc_profile=profile)
    seen = Image.open(io.BytesIO(file.getvalue()))
    assert difference(load_image(file), right(seen, profile)) <= 2


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_of_linear_grey_keep_their_dark_values(image_format: str) -> None:
    values = np.linspace(0, 2000, 256).astype(np.uint16).reshape(16, 16)
    file = encoded(Image.fromarray(values), image_format, icc_profile=grey_profile(1.0))
    linear = values / 65535
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert difference(load_image(file), np.round(srgb * 255)[..., None]) <= 2


def test_grey_values_with_a_profile_of_rgb_are_seen_as_its_greys() -> None:
    profile = rgb_profile(*PROPHOTO)
    stored = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    file = encoded(stored, "JPEG", icc_profile=profile)
    seen = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    assert difference(load_image(file), right(seen, profile)) <= 2


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF"])
def test_cmyk_with_a_profile_becomes_srgb(image_format: str) -> None:
    profile = cmyk_profile()
    file = encoded(smooth_image("CMYK"), image_format, icc_profile=profile)
    stored = Image.open(io.BytesIO(file.getvalue()))
    assert stored.mode == "CMYK"
    assert difference(load_image(file), right(stored, profile)) <= 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_images_with_a_profile_are_put_on_an_srgb_background(mode: str) -> None:
    profile = grey_profile(1.0) if mode == "LA" else rgb_profile(*DISPLAY_P3)
    image = Image.new("RGBA", (8, 8), (200, 60, 60, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    stored = image.quantize(4) if mode == "P" else image.convert(mode)
    loaded = load_image(encoded(stored, "PNG", icc_profile=profile), background=(255, 0, 128))
    opaque = image.convert("L" if mode == "LA" else "RGB")
    assert loaded.getpixel((1, 4)) == (255, 0, 128)
    assert difference(loaded.crop((6, 0, 8, 8)), right(opaque, profile)[:, 6:]) <= 2


def test_sixteen_bit_grey_with_a_profile_and_a_transparent_value_is_put_on_the_background() -> None:
    values = np.full((4, 4), 1000, np.uint16)
    values[0] = 40_000
    data = encoded(Image.fromarray(values), "PNG", icc_profile=grey_profile(1.0)).getvalue()
    at = data.index(b"IDAT") - 4
    body = struct.pack(">H", 1000)
    trns = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    loaded = load_image(io.BytesIO(data[:at] + trns + data[at:]), background=(1, 2, 3))
    assert loaded.getpixel((2, 2)) == (1, 2, 3)
    assert abs(loaded.getpixel((0, 0))[0] - 204) <= 2


def test_a_turned_image_keeps_its_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = rgb_profile(*DISPLAY_P3)
    file = encoded(Image.new("RGB", (16, 8), (200, 60, 60)), "JPEG", icc_profile=profile, exif=exif)
    loaded = load_image(file)
    assert loaded.size == (8, 16)
    assert difference(loaded, np.array([217, 42, 52])) <= 4
    assert difference(load_thumbnail(file, side=4), np.array([217, 42, 52])) <= 4


def test_chunks_of_a_png_without_a_profile_describe_its_colors() -> None:
    data = encoded(Image.new("RGB", (4, 4), (128, 128, 128)), "PNG").getvalue()
    linear = with_chunks(data, gama(1.0))
    assert difference(load_image(linear), np.array([188] * 3)) <= 1
    wide = encoded(Image.new("RGB", (4, 4), (200, 60, 60)), "PNG").getvalue()
    p3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    assert difference(load_image(with_chunks(wide, chrm(p3))), np.array([217, 42, 52])) <= 2
    pure = right(Image.new("RGB", (4, 4), (200, 60, 60)), rgb_profile(p3, 2.2))
    assert difference(load_image(with_chunks(wide, gama(0.45455), chrm(p3))), pure) <= 2
    for grey in (Image.new("L", (4, 4), 128), Image.fromarray(np.full((4, 4), 32896, np.uint16))):
        file = with_chunks(encoded(grey, "PNG").getvalue(), gama(1.0))
        assert difference(load_image(file), np.array([188] * 3)) <= 1


@pytest.mark.parametrize(
    "chunks",
    [
        [gama(0.45455)],
        [gama(0.45455), chrm((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))],
        [(b"sRGB", b"\0"), gama(1.0)],
        [chrm((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))],
    ],
)
def test_chunks_that_mean_srgb_change_nothing(chunks: list[tuple[bytes, bytes]]) -> None:
    data = encoded(noise_image(), "PNG").getvalue()
    file = with_chunks(data, *chunks)
    assert difference(load_image(file), np.asarray(noise_image(), int)) == 0
    assert not read_header(file).profile_fault


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile at all",
        rgb_profile(*DISPLAY_P3)[:200],
        rgb_profile(*DISPLAY_P3)[:128] + b"\xff" * 400,
        grey_profile(2.2),
        cmyk_profile(),
    ],
    ids=["text", "cut", "damaged", "grey", "cmyk"],
)
def test_a_broken_or_foreign_profile_is_named_and_the_values_are_srgb(profile: bytes) -> None:
    file = encoded(noise_image(), "PNG", icc_profile=profile)
    assert "color profile" in read_header(file).profile_fault
    assert difference(load_image(file), np.asarray(noise_image(), int)) == 0


@pytest.mark.parametrize(
    "chunk",
    [
        gama(0.0),
        chrm((0, 0, 0, 0, 0, 0, 0, 0)),
        chrm((0.3, 0.3, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3)),
        (b"cHRM", b"\0\0\0\1" * 3),
        (b"iCCP", b"name\0\0" + b"not deflated"),
        (b"iCCP", b"name\0\0" + zlib.compress(b"\0" * (2 << 20))),  # above Pillow's limit
        (b"iCCP", b"name\0\1" + zlib.compress(srgb_profile())),  # an unknown method
        (b"iCCP", b"name"),
        (b"iCCP", b""),
    ],
)
def test_broken_color_chunks_are_named_and_the_values_are_srgb(chunk: tuple[bytes, bytes]) -> None:
    file = with_chunks(encoded(noise_image(), "PNG").getvalue(), chunk)
    header = read_header(file)
    assert header.profile_fault
    assert header.looks_complete
    assert difference(load_image(file), np.asarray(noise_image(), int)) == 0


def test_damaged_profiles_never_raise() -> None:
    rng, good = np.random.default_rng(0), rgb_profile(*DISPLAY_P3)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(4):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        image = noise_image()
        image.info["icc_profile"] = bytes(data)
        assert to_srgb(image).size == image.size
        assert not (is_converted(image) and profile_fault(image))


def test_text_of_a_hostile_name_is_no_profile() -> None:
    image = noise_image()
    image.info |= {"icc_profile": "text", "gamma": "text", "chromaticity": "text", "srgb": "text"}
    assert to_srgb(image) is image
    assert not profile_fault(image)


def test_the_values_of_a_mask_are_no_colors() -> None:
    mask = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    file = encoded(mask, "PNG", icc_profile=grey_profile(1.0))
    assert difference(load_mask(file), np.asarray(mask, int)) == 0


def test_images_given_to_the_pipeline_are_converted_once(caplog: pytest.LogCaptureFixture) -> None:
    image = decode_image(
        encoded(
            Image.new("RGB", (8, 8), (200, 60, 60)), "PNG", icc_profile=rgb_profile(*DISPLAY_P3)
        )
    )
    mask = Image.new("L", (8, 8), 128)
    mask.info["icc_profile"] = grey_profile(1.0)

    def given(value: Image.Image) -> tuple[Image.Image, Image.Image]:
        inputs = read_image_inputs(
            value, mask, strength=None, num_prompts=1, num_images=1, needs_mask=False
        )
        return inputs.image[0], inputs.mask[0]

    seen, seen_mask = given(image)
    assert difference(seen, np.array([217, 42, 52])) <= 2
    assert difference(given(seen)[0], np.asarray(seen, int)) == 0
    assert seen_mask.getpixel((0, 0)) == (128, 128, 128)
    broken = noise_image(width=8, height=8)
    broken.info["icc_profile"] = b"broken"
    with caplog.at_level(logging.WARNING):
        assert difference(given(broken)[0], np.asarray(broken, int)) == 0
    assert "image is read as sRGB: damaged color profile" in caplog.text
    deep = Image.fromarray(np.full((8, 8), 32896, np.uint16))
    assert given(deep)[0].getpixel((0, 0)) == (128, 128, 128)
