"""ICC profiles made by hand: wide RGB, grey and a CMYK of 16 corners."""

import struct
from collections.abc import Sequence

import numpy as np
from PIL import ImageCms

D65, D50 = (0.3127, 0.329), (0.3457, 0.3585)
# (white, red, green, blue as x and y; gamma, None for sRGB's curve)
DISPLAY_P3 = ((*D65, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), None)
ADOBE_RGB = ((*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 563 / 256)
PROPHOTO = ((*D50, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001), 1.8)


def srgb_profile() -> bytes:
    """Little CMS's own sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def rgb_profile(chromaticity: Sequence[float], gamma: float | None) -> bytes:
    """A display profile of three primaries and one curve."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in np.reshape(chromaticity, (4, 2))])
    columns = xyz[1:].T * np.linalg.solve(xyz[1:].T, xyz[0])
    cone = np.array(
        [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
    )
    white = np.array([0.9642, 1.0, 0.8249])
    columns = np.linalg.inv(cone) @ np.diag(cone @ white / (cone @ xyz[0])) @ cone @ columns
    tags = {b"wtpt": _xyz(white)}
    for name, column in zip((b"r", b"g", b"b"), columns.T, strict=True):
        tags |= {name + b"XYZ": _xyz(column), name + b"TRC": _curve(gamma)}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """A grey display profile."""
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"kTRC": _curve(gamma)}
    return _profile(b"mntr", b"GRAY", b"XYZ ", tags)


def cmyk_profile() -> bytes:
    """A printer's profile: the Lab color of each corner of the CMYK cube, linear between."""
    corners = []
    for c, m, y, k in np.ndindex(2, 2, 2, 2):
        light = (1 - k) * (100 - 35 * c - 40 * m - 8 * y)
        corners.append((light / 100 * 255, 128 - 35 * c + 70 * m, 128 - 45 * c + 85 * y))
    table = np.clip(np.round(corners), 0, 255).astype(np.uint8).tobytes()
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + matrix + identity * 4 + table + identity * 3
    tags = {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"A2B0": lut}
    return _profile(b"prtr", b"CMYK", b"Lab ", tags)


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return struct.pack(">4s4xIHxx", b"curv", 1, round(gamma * 256))
    values = np.linspace(0, 1, 1024)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    points = np.round(linear * 65535).astype(">u2").tobytes()
    return struct.pack(">4s4xI", b"curv", 1024) + points


def _xyz(values: Sequence[float]) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size, version = start + len(body), 0x02400000
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, version, kind, space, connection, b"acsp")
    head += struct.pack(">3i48x", 63190, 65536, 54061)
    return head + struct.pack(">I", len(tags)) + table + body
