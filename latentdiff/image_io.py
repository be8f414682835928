"""One image file to sRGB as it is seen: decoded, oriented, its color profile applied, 8 bits deep,
put on a background.

Answers for every way a file can disappoint: each ends in an `ImageError` that names the reason. A
broken color profile is none: the values are taken as sRGB, and `read_header` names it.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from latentdiff.icc import is_converted, profile_fault, to_srgb

MAX_PIXELS = 89_478_485  # a quarter of 1 GiB at 3 bytes a pixel: Pillow's own limit
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
EXTENSIONS = {  # the one table of the files that are read, for listing and for loading
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
}
READABLE_EXTENSIONS = tuple(sorted({name for names in EXTENSIONS.values() for name in names}))
# Kinds of image that are not read, as their decoders are missing, unsafe or without an agreed look.
UNREADABLE_EXTENSIONS = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jpm", ".j2c", ".jxr"),
    *(".svg", ".svgz", ".eps", ".ai", ".tga", ".psd", ".psb", ".xcf", ".kra", ".clip", ".qoi"),
    *(".ico", ".icns", ".cur", ".pcx", ".dds", ".exr", ".hdr", ".pfm", ".pam", ".bpg", ".flif"),
    *(".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".wdp", ".sgi", ".xbm", ".xpm", ".raw"),
)
# Names of browsers and download tools for what mostly is a JPEG, PNG or WebP: read by content.
BY_CONTENT_EXTENSIONS = (
    *(".jpg_large", ".jpg-large", ".jpg_orig", ".jpeg_large"),
    *(".png_large", ".png-large", ".webp_large"),
)
IMAGE_EXTENSIONS = (  # of files that mean to be images
    READABLE_EXTENSIONS + UNREADABLE_EXTENSIONS + BY_CONTENT_EXTENSIONS
)
# What Pillow's decoders raise on damaged files, found by feeding them damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    IndexError,
    TypeError,
    RuntimeError,
)
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8")
EXIF_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
ImageSource = str | Path | BinaryIO


class ImageError(ValueError):
    """An image that cannot be used, for a `reason` of `problems.REASONS`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageHeader:
    """The size and kind of an image by its header; width and height in pixels as it is seen."""

    width: int
    height: int
    format: str
    is_animated: bool
    looks_complete: bool  # the file ends as files of its format do
    has_orientation: bool  # its EXIF orientation is not 1
    is_converted: bool  # its color profile is not sRGB's, so that its values are converted
    profile_fault: str  # why its color profile cannot be used; empty where it can


def load_image(
    source: ImageSource, *, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Decode an image to sRGB as it is seen: oriented, 8 bits deep, put on `background`.

    source: a path or an open binary file. Raises ImageError for a file that is empty, truncated,
    not an image, of an unsupported kind, or above 89 Mpx (the last before anything is decoded).
    """
    return to_rgb(to_srgb(_oriented(decode_image(source))), background=background)


def load_mask(source: ImageSource) -> Image.Image:
    """Decode a mask to mode "L", 255 for white: oriented, transparency on black.

    Its values are weights and no colors: a color profile does not change them. Raises ImageError
    as `load_image` does.
    """
    return to_rgb(_oriented(decode_image(source)), background=(0, 0, 0)).convert("L")


def decode_image(source: ImageSource) -> Image.Image:
    """Decode an image as it is stored: not oriented, in its own mode and colors, which its info
    tells. Raises ImageError as `load_image` does."""
    with _opened(source) as image:
        try:
            image.load()
        except DECODE_ERRORS as error:
            raise ImageError("truncated", _message(error)) from error
        return image


def load_alpha(source: ImageSource) -> Image.Image:
    """Decode how opaque an image is: mode "L", 255 all over where it knows no transparency.

    Oriented as `load_image` orients it; raises ImageError as that does.
    """
    with _opened(source) as image:
        try:
            image.load()
            seen = _oriented(image)
            if seen.mode in ALPHA_MODES or "transparency" in seen.info:
                return seen.convert("RGBA").getchannel("A")
        except DECODE_ERRORS as error:
            raise ImageError("truncated", _message(error)) from error
        return Image.new("L", seen.size, 255)


def load_thumbnail(
    source: ImageSource, *, side: int, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Decode an image as `load_image` does and shrink it to at most `side` pixels a side.

    A JPEG is decoded at a reduced size, which is many times faster and a little less exact.
    """
    with _opened(source) as image:
        try:
            image.draft("RGB", (2 * side, 2 * side))
            image.load()
        except DECODE_ERRORS as error:
            raise ImageError("truncated", _message(error)) from error
        small = to_rgb(to_srgb(_oriented(image)), background=background)
    small.thumbnail((side, side))
    return small


def read_header(source: ImageSource) -> ImageHeader:
    """Read an image's size and kind, not its pixels. Raises ImageError as `load_image`."""
    with _opened(source) as image:
        try:
            width, height = image.size
            orientation = _orientation(image)
            if orientation in (5, 6, 7, 8):
                width, height = height, width
            animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
            whole = _ends_well(image)
        except DECODE_ERRORS as error:
            raise ImageError("truncated", _message(error)) from error
        return ImageHeader(
            width=width,
            height=height,
            format=str(image.format),
            is_animated=animated,
            looks_complete=whole,
            has_orientation=orientation != 1,
            is_converted=is_converted(image),
            profile_fault=profile_fault(image),
        )


def _opened(source: ImageSource) -> ImageFile:
    """Open an image lazily and refuse what must not be decoded."""
    try:
        image = _open_lazily(source)
    except PermissionError as error:
        raise ImageError("unreadable", error.strerror or str(error)) from error
    except (FileNotFoundError, IsADirectoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", _message(error)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(source) from error
    except DECODE_ERRORS as error:
        raise ImageError("truncated", _message(error)) from error
    num_pixels = image.width * image.height
    if not 0 < num_pixels <= MAX_PIXELS:
        image.close()
        reason = "too_many_pixels" if num_pixels else "truncated"
        raise ImageError(reason, f"{image.width} x {image.height} pixels")
    return image


def _open_lazily(source: ImageSource) -> ImageFile:
    """Open an image, a PNG with a profile that Pillow refuses without it, which its info tells."""
    try:
        return Image.open(source, formats=_readable_formats())
    except (UnidentifiedImageError, SyntaxError, ValueError):
        if (plain := _without_profile(source)) is None:
            raise
    image = Image.open(plain, formats=_readable_formats())
    image.info["icc_profile"] = None  # as Pillow reports one that does not unpack
    return image


def _without_profile(source: ImageSource) -> io.BytesIO | None:
    """Copy a PNG file without its color profile; None where there is none."""
    if not _head(source).startswith(b"\x89PNG"):
        return None
    data, at = _head(source, num_bytes=-1), 8
    kept = [data[:at]]
    while (kind := data[at + 4 : at + 8]) not in (b"", b"IDAT", b"IEND"):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kept.append(b"" if kind == b"iCCP" else data[at:end])
        at = end
    return io.BytesIO(b"".join([*kept, data[at:]])) if b"" in kept else None


@cache
def _readable_formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(source: ImageSource) -> ImageError:
    head = _head(source)
    if not head:
        return ImageError("empty_file", "0 bytes")
    known = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"jP  ": "JPEG 2000"}
    name = known.get(head[8:12] if head[4:8] == b"ftyp" else head[4:8])
    if b"<svg" in head.lower():
        name = "SVG"
    if name:
        return ImageError("unsupported", f"{name} file")
    if head.startswith(MAGIC) or head[8:12] == b"WEBP" or head[4:12] == b"ftypavif":
        return ImageError("truncated", "damaged header")
    return ImageError("not_an_image", f"starts with {ascii(head[:8])[1:]}")


def _head(source: ImageSource, num_bytes: int = 512) -> bytes:
    if isinstance(source, str | Path):
        with open(source, "rb") as file:
            return file.read(num_bytes)
    source.seek(0)
    return source.read(num_bytes)


def _orientation(image: ImageFile) -> int:
    """Read the EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        if image.format == "TIFF":
            return 1  # Pillow's TIFF reader swaps the size by itself
        if image.format == "PNG" and not _has_late_exif(image):
            exif = Image.Image.getexif(image)  # PNG's own would decode the image
        else:
            exif = image.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def _has_late_exif(image: ImageFile) -> bool:
    """Return whether a PNG has EXIF or XMP behind its pixels."""
    file = image.fp
    assert file is not None
    position = file.tell()
    file.seek(8)
    seen: set[bytes] = set()
    found = False
    while b"IEND" not in seen and not found and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        keyword = file.read(min(length, 22)) if kind in (b"iTXt", b"tEXt", b"zTXt") else b""
        is_exif = kind == b"eXIf" or keyword.startswith(EXIF_KEYWORDS)
        found = is_exif and b"IDAT" in seen
        file.seek(length - len(keyword) + 4, io.SEEK_CUR)
        seen.add(kind)
    file.seek(position)
    return found


def _oriented(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DECODE_ERRORS:
        return image  # a damaged EXIF block has no orientation


def to_rgb(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    """Convert an image of any mode to RGB, 8 bits deep, on a background; values are not colors yet
    where `icc.to_srgb` has not been applied. Raises ImageError for a mode without an agreed range.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _from_deep_grey(image, background)
    try:
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            rgba = image.convert("RGBA")
            base = Image.new("RGBA", rgba.size, (*background, 255))
            return Image.alpha_composite(base, rgba).convert("RGB")
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    except DECODE_ERRORS as error:
        raise ImageError("unsupported", f"colour mode {image.mode}: {_message(error)}") from error


def _from_deep_grey(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Rescale 16-bit grey, 0 to 65535, to 8 bits; other depths have no agreed range."""
    values = np.array(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", f"samples of mode {image.mode} have no agreed range")
    grey = np.round(values.astype(np.float64) / 257.0).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        rgb.paste(background, mask=Image.fromarray((values == clear).astype(np.uint8) * 255))
    return rgb


def _ends_well(image: ImageFile) -> bool:
    """Compare a file's last bytes with the end its format has. False means: decode it to know."""
    file = image.fp
    if file is None:
        return True
    position = file.tell()
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 16))
    tail = file.read()
    jpeg = tail.rstrip(b"\0")[-2:] == b"\xff\xd9"
    ends = {
        "JPEG": jpeg,
        "MPO": jpeg,
        "PNG": tail.endswith(b"IEND\xaeB`\x82"),
        "GIF": tail.rstrip(b"\0")[-1:] == b";",
    }
    if image.format == "WEBP":
        file.seek(4)
        (riff,) = struct.unpack("<I", file.read(4))
        ends["WEBP"] = size >= riff + 8
    file.seek(position)
    return bool(ends.get(str(image.format), False))


def _message(error: BaseException) -> str:
    return str(error) or type(error).__name__
