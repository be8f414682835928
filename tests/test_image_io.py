"""Image files: every way a file can disappoint, orientation, transparency, depth."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from fakes_data import noise_image, png_header
from PIL import Image

from latentdiff.image_io import ImageError, load_image, read_header

ALL_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"]


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(ImageError) as error:
        load_image(io.BytesIO(data))
    return error.value.reason


def array(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


@pytest.mark.parametrize("image_format", ALL_FORMATS)
def test_each_format_opens_whatever_its_file_is_called(tmp_path, image_format):
    path = tmp_path / "source.dat"
    path.write_bytes(encoded(noise_image(), image_format))
    image = load_image(path)
    assert image.mode == "RGB"
    assert image.size == (40, 32)
    assert read_header(path).format == image_format
    tolerance = 0 if image_format in ("PNG", "BMP", "TIFF", "PPM") else 8
    assert abs(array(image) - array(noise_image())).mean() <= tolerance


@pytest.mark.parametrize("image_format", ALL_FORMATS)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.98])
def test_truncated_files_are_refused_never_padded(image_format, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, image_format)
    cut = data[: int(len(data) * part)]
    assert reason(cut) == "truncated"
    with contextlib.suppress(ImageError):
        assert not read_header(io.BytesIO(cut)).looks_complete, (
            "the scan must decode it to find out"
        )


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_complete_files_look_complete(image_format):
    assert read_header(io.BytesIO(encoded(noise_image(), image_format))).looks_complete


def test_a_damaged_chunk_is_refused():
    data = bytearray(encoded(noise_image(), "PNG"))
    at = data.index(b"IDAT") + 20
    data[at] ^= 0xFF
    assert reason(bytes(data)) == "truncated"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty_file"),
        (b"hello, this is text\n" * 10, "not_an_image"),
        (b"<html><body>404</body></html>", "not_an_image"),
        (b"\xff\xd8\xff\xe0", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"RIFF\x10\0\0\0WEBP", "truncated"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "unsupported"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "unsupported"),
        (b"%PDF-1.4 " + b"\0" * 40, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image"),
    ],
)
def test_files_that_are_no_images_are_named(data, expected):
    assert reason(data) == expected


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20_000, 20_000), (89_478_486, 1)])
def test_more_than_89_megapixels_is_refused_before_decoding(width, height):
    assert reason(png_header(width, height)) == "too_many_pixels"
    with pytest.raises(ImageError):
        read_header(io.BytesIO(png_header(width, height)))


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_before_the_size(image_format, orientation):
    turn = Image.Transpose
    undo = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    undo |= {5: turn.TRANSPOSE, 6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    upright = noise_image(width=48, height=24)
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, image_format, exif=exif)
    loaded = load_image(io.BytesIO(data))
    header = read_header(io.BytesIO(data))
    assert loaded.size == (header.width, header.height) == (48, 24)
    assert abs(array(loaded) - array(upright)).mean() < 8


def test_orientation_behind_the_pixels_of_a_png_is_found():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise_image(), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    length = struct.unpack(">I", data[at : at + 4])[0] + 12
    end = data.index(b"IEND") - 4
    late = data[:at] + data[at + length : end] + data[at : at + length] + data[end:]
    assert read_header(io.BytesIO(late)).width == 32
    assert load_image(io.BytesIO(late)).size == (32, 40)


@pytest.mark.parametrize("is_late", [False, True])
def test_orientation_in_the_xmp_of_a_png_is_found(is_late):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    body = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp
    chunk = struct.pack(">I", len(body)) + b"iTXt" + body
    chunk += struct.pack(">I", zlib.crc32(b"iTXt" + body))
    data = encoded(noise_image(), "PNG")
    at = data.index(b"IEND" if is_late else b"IDAT") - 4
    data = data[:at] + chunk + data[at:]
    header = read_header(io.BytesIO(data))
    assert (header.width, header.height) == load_image(io.BytesIO(data)).size == (32, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_is_no_reason_to_refuse():
    data = encoded(noise_image(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(io.BytesIO(data)).size == (40, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_the_background(mode):
    image = Image.new("RGBA", (8, 8), (10, 200, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    stored = image.convert(mode) if mode != "P" else image.quantize(4)
    loaded = array(load_image(io.BytesIO(encoded(stored, "PNG")), background=(255, 0, 128)))
    assert loaded[4, 1].tolist() == [255, 0, 128]
    assert abs(loaded[4, 6] - (array(stored.convert("RGB"))[4, 6])).max() <= 1


def test_half_transparency_blends():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    loaded = array(load_image(io.BytesIO(encoded(image, "PNG")), background=(255, 255, 255)))
    assert abs(loaded - 127).max() <= 1


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 77), ("P", 0)])
def test_a_single_transparent_colour_is_put_on_the_background(mode, colour):
    image = Image.new(mode, (8, 8), colour)
    data = encoded(image, "PNG", transparency=colour)
    assert array(load_image(io.BytesIO(data), background=(9, 8, 7)))[0, 0].tolist() == [9, 8, 7]


def test_cmyk_is_converted():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    red = array(load_image(io.BytesIO(encoded(image, "JPEG"))))[8, 8]
    assert red[0] > 200
    assert red[1:].max() < 60


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_rescaled_not_clipped(image_format):
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    loaded = array(load_image(io.BytesIO(encoded(Image.fromarray(values), image_format))))
    np.testing.assert_array_equal(loaded[..., 0], np.round(values / 257.0))
    np.testing.assert_array_equal(loaded[..., 0], loaded[..., 2])


def test_sixteen_bit_grey_with_a_transparent_value_is_put_on_the_background():
    values = np.full((4, 4), 1000, np.uint16)
    values[0] = 40_000
    data = encoded(Image.fromarray(values), "PNG")
    body = struct.pack(">H", 1000)
    trns = struct.pack(">I", 2) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    at = data.index(b"IDAT") - 4
    loaded = array(load_image(io.BytesIO(data[:at] + trns + data[at:]), background=(1, 2, 3)))
    assert loaded[2, 2].tolist() == [1, 2, 3]
    assert loaded[0, 0].tolist() == [156, 156, 156]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_samples_without_an_agreed_range_are_refused(dtype):
    values = np.full((4, 4), 100_000).astype(dtype)
    assert reason(encoded(Image.fromarray(values), "TIFF")) == "unsupported"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr"])
def test_other_colour_modes_become_rgb(mode):
    image_format = "JPEG" if mode == "YCbCr" else "PNG"
    loaded = load_image(io.BytesIO(encoded(noise_image(mode=mode), image_format)))
    assert loaded.mode == "RGB"


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame_and_say_so(image_format):
    frames = [Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert read_header(io.BytesIO(data)).is_animated
    assert array(load_image(io.BytesIO(data)))[4, 4, 0] > 200


def test_the_users_file_object_stays_open():
    file = io.BytesIO(encoded(noise_image(), "PNG"))
    load_image(file)
    assert not file.closed


def test_damaged_files_of_any_kind_end_in_an_image_error():
    rng = np.random.default_rng(0)
    originals = [encoded(noise_image(1), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    for trial in range(300):
        data = bytearray(originals[trial % len(originals)])
        for _ in range(3):
            data[int(rng.integers(min(len(data), 120)))] = int(rng.integers(256))
        try:
            header = read_header(io.BytesIO(data))
            size = load_image(io.BytesIO(data)).size
        except ImageError:
            continue
        assert size == (header.width, header.height)
