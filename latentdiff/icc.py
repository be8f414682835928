"""Color profiles: in which colors an image's values are, and their conversion to sRGB.

A profile is the ICC profile in the file, or for a PNG without one what its gAMA and cHRM chunks
describe. An image without a profile, or with a profile of sRGB itself, is sRGB and stays as it is,
bit for bit. Conversion is Little CMS's, with the perceptual intent, as Pillow does by default.
"""

import io
import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

VERSION = 1  # raise it when converted values change: caches know images by it
IDENTICAL = 1  # a profile that moves no 8-bit value further is that of sRGB
SRGB_CHROMATICITY = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # white, red, green, blue
SRGB_GAMMA, GAMMA_TOLERANCE = 1 / 2.2, 0.05  # a gAMA this near means sRGB's curve, as in libpng
D50 = (0.9642, 1.0, 0.8249)  # white point of every profile
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
GREY_MODES = ("1", "L", "LA", "La")
RGB_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr")
Transform = ImageCms.ImageCmsTransform


class ProfileError(ValueError):
    """A profile that is damaged, or of another kind of color than its image."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image's colors to sRGB: mode RGB, or RGBA where it knows transparency.

    The image itself, of any mode, where its values are sRGB already or its profile is broken.
    """
    try:
        transform = srgb_transform(image)
    except ProfileError:
        return image
    if transform is None:
        return image
    alpha, colors = _alpha(image), _colors(image, transform.input_mode)
    converted = transform.apply(colors)
    if alpha is not None:
        converted.putalpha(alpha)
    converted.info = {}  # not the profile's any more, nor the one transparent color
    return converted


def srgb_transform(image: Image.Image) -> Transform | None:
    """Find the transform from an image's colors to sRGB; None where they are sRGB.

    Raises ProfileError for a profile that cannot be used.
    """
    if not (profile := _find_profile(image)):
        return None
    space = profile[16:20].decode("latin-1").strip()  # ICC.1:2010, 7.2.6
    if profile[36:40] != b"acsp" or not space.isalnum():
        raise ProfileError("damaged color profile: no header of one")
    if (mode := _input_mode(image.mode, space)) is None:
        raise ProfileError(f"color profile of {space!a} in an image of mode {image.mode}")
    return _transform(profile, mode)


def is_converted(image: Image.Image) -> bool:
    """Return whether `to_srgb` converts an image."""
    try:
        return srgb_transform(image) is not None
    except ProfileError:
        return False


def profile_fault(image: Image.Image) -> str:
    """Say why an image's color profile cannot be used; empty where it can, or there is none."""
    try:
        srgb_transform(image)
    except ProfileError as error:
        return str(error)
    return ""


def _find_profile(image: Image.Image) -> bytes | None:
    if "icc_profile" not in image.info:
        return _png_profile(image)
    profile = image.info["icc_profile"]
    if profile is None or (isinstance(profile, bytes) and profile):
        if profile is None:  # as Pillow reports one that does not unpack
            raise ProfileError("damaged color profile: it cannot be unpacked")
        return profile
    return None


def _input_mode(mode: str, space: str) -> str | None:
    """Name the mode in which values of an image go into a profile of `space`; None if none fits."""
    is_deep = mode == "I" or mode.startswith("I;16")
    if space == "GRAY" and (is_deep or mode in GREY_MODES):
        return "I;16" if is_deep else "L"
    if space == "RGB" and (is_deep or mode in GREY_MODES + RGB_MODES):
        return "RGB"
    return "CMYK" if space == mode == "CMYK" else None


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """Build a transform that threads may share; None where it changes nothing."""
    flags = ImageCms.Flags.NOCACHE
    if mode == "I;16":
        flags |= ImageCms.Flags.NOOPTIMIZE  # its tables would be coarse in the dark
    try:
        transform = ImageCms.ImageCmsTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            flags=flags,
        )
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        raise ProfileError(f"damaged color profile: {error}") from error
    if mode == "CMYK":
        return transform
    samples = _samples(mode)
    wanted = _grey_to_8_bits(samples) if mode == "I;16" else samples
    changes = np.asarray(transform.apply(samples), int) - np.asarray(wanted.convert("RGB"), int)
    return transform if abs(changes).max() > IDENTICAL else None


def _samples(mode: str) -> Image.Image:
    """Every grey, or 17 values a channel in all combinations."""
    greys = np.arange(256, dtype=np.uint8)[None]
    if mode == "L":
        return Image.fromarray(greys)
    if mode == "I;16":
        return Image.fromarray(greys.astype(np.uint16) * 257)
    axis = np.linspace(0, 255, 17).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    return Image.fromarray(cube.reshape(17, 17 * 17, 3))


def _colors(image: Image.Image, mode: str) -> Image.Image:
    """Give an image's values without transparency, in the mode that a transform reads."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _grey_to_8_bits(image)
    if image.mode in ("La", "RGBa", "P"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image if image.mode == mode else image.convert(mode)


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.round(np.asarray(image, np.float64) / 257).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    if image.mode == "I" or image.mode.startswith("I;16"):
        is_clear = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def _png_profile(image: Image.Image) -> bytes | None:
    """Build the profile that a PNG's gAMA and cHRM chunks describe; None where that is sRGB.

    An sRGB chunk comes first. A gamma near 1 / 2.2 stands for sRGB's own curve where the primaries
    are sRGB's or not given: programs write it into sRGB images.
    """
    gamma, chromaticity = image.info.get("gamma"), image.info.get("chromaticity")
    if isinstance(image.info.get("srgb"), int) or not (
        isinstance(gamma, float) or isinstance(chromaticity, tuple)
    ):
        return None
    is_grey = image.mode in GREY_MODES or image.mode.startswith("I")
    if is_grey or not isinstance(chromaticity, tuple):
        chromaticity = SRGB_CHROMATICITY
    gamma = gamma if isinstance(gamma, float) else None
    if gamma is not None and not 0.05 <= gamma <= 20:
        raise ProfileError(f"gAMA chunk of {gamma:g}")
    is_like_srgb = gamma is None or abs(gamma / SRGB_GAMMA - 1) <= GAMMA_TOLERANCE
    has_srgb_primaries = len(chromaticity) == 8 and np.allclose(
        chromaticity, SRGB_CHROMATICITY, rtol=0, atol=0.005
    )
    if is_like_srgb and has_srgb_primaries:
        return None
    curve = _curve(gamma)
    if is_grey:
        return _profile("GRAY", {"wtpt": _xyz(D50), "kTRC": curve})
    columns = _primaries(chromaticity)
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", columns.T, strict=True)}
    return _profile("RGB ", {"wtpt": _xyz(D50), **tags, **{f"{n}TRC": curve for n in "rgb"}})


def _primaries(chromaticity: tuple[float, ...]) -> np.ndarray:
    """Turn (x, y) of white, red, green and blue into XYZ columns under D50 (ICC.1, Annex E)."""
    values = np.array(chromaticity, float)
    if values.shape != (8,) or not (values[1::2] > 0).all() or (values > 2).any():
        raise ProfileError(f"cHRM chunk of {chromaticity}")
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in values.reshape(4, 2)]).T  # (3, 4)
    if abs(np.linalg.det(xyz[:, 1:])) < 1e-6:
        raise ProfileError("cHRM chunk whose primaries lie on a line")
    columns = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], xyz[:, 0])
    scale = (BRADFORD @ D50) / (BRADFORD @ xyz[:, 0])
    adapted: np.ndarray = np.linalg.solve(BRADFORD, scale[:, None] * (BRADFORD @ columns))
    if not (np.isfinite(adapted).all() and abs(adapted).max() < 4):
        raise ProfileError(f"cHRM chunk of {chromaticity}")
    return adapted


def _curve(gamma: float | None) -> bytes:
    """Encode the tone curve of a file gamma as ICC.1's parametricCurveType; None: sRGB's."""
    if gamma is not None:
        return struct.pack(">4s4xHxxi", b"para", 0, _fixed(1 / gamma))
    srgb = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return struct.pack(">4s4xHxx5i", b"para", 3, *map(_fixed, srgb))


def _xyz(values: Any) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *map(_fixed, values))


def _fixed(value: float) -> int:
    return math.floor(value * 65536 + 0.5)


def _profile(space: str, tags: dict[str, bytes]) -> bytes:
    """Lay out a display profile (ICC.1:2010, 7.2 and 7.3)."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x3i48x",
        start + len(body),
        b"",
        0x04200000,
        b"mntr",
        space.encode(),
        b"XYZ ",
        b"acsp",
        *map(_fixed, D50),
    )
    return head + struct.pack(">I", len(tags)) + table + body
