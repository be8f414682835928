"""SDXL's sizes of a crop: original, corner and target, by values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentdiff.data.buckets import make_buckets
from latentdiff.data.cache.decode_ahead import CropPlan
from latentdiff.data.images import resize_and_crop

Size = tuple[int, int]
# (height, width) stored; bucket; place of the crop; mirrored; (top, left) of the corner
TABLE = [
    ((64, 64), (64, 64), 0.5, False, (0, 0)),  # as it is
    ((100, 200), (64, 64), 0.5, False, (0, 32)),  # to 64 x 128, 64 px of room
    ((100, 200), (64, 64), 0.0, False, (0, 0)),
    ((100, 200), (64, 64), 0.0, True, (0, 64)),  # the left crop is the mirrored image's right
    ((100, 200), (64, 64), 0.25, False, (0, 16)),
    ((100, 200), (64, 64), 0.25, True, (0, 48)),
    ((200, 100), (64, 64), 1.0, True, (64, 0)),  # a flip leaves the top
    ((32, 48), (64, 64), 0.5, False, (0, 16)),  # scaled up to 64 x 96: stays 32 x 48 here
    ((1600, 1000), (1216, 832), 0.5, False, (58, 0)),  # to 1331 x 832, a bucket of 1024 px
    ((832, 1216), (832, 1216), 0.5, True, (0, 0)),
    ((768, 1408), (768, 1344), 1.0, False, (0, 64)),  # not resized
    ((768, 1408), (768, 1344), 1.0, True, (0, 0)),
]


@pytest.mark.parametrize(("original", "bucket", "place", "flip", "corner"), TABLE)
def test_sizes_are_those_of_the_crop_that_the_model_sees(
    original: Size, bucket: Size, place: float, flip: bool, corner: Size
) -> None:
    plan = CropPlan(sizes=np.array([bucket]), places=(place,))
    found = plan.time_ids(0, original, u=0.0, flip=flip)
    assert found.tolist() == [*original, *corner, *bucket]


@pytest.mark.parametrize(("original", "bucket", "place", "flip", "corner"), TABLE[:8])
def test_corner_is_where_the_pixels_come_from(
    original: Size, bucket: Size, place: float, flip: bool, corner: Size
) -> None:
    """A ramp from left to right, mirrored or not: its first column tells the corner."""
    ramp = np.broadcast_to(np.linspace(0, 255, original[1])[:, None], (*original, 3))
    image = Image.fromarray(ramp.astype(np.uint8))
    crop = resize_and_crop(image, height=bucket[0], width=bucket[1], crop=(place, place), flip=flip)
    scale = max(bucket[0] / original[0], bucket[1] / original[1])
    width = round(original[1] * scale)
    column = corner[1] + 0.5 if not flip else width - corner[1] - 0.5
    seen = np.asarray(crop.image)[0, 0, 0]
    assert abs(seen - 255 * column / width) <= 6
    assert crop.original_size == original


def test_buckets_of_1024_pixels_hold_sdxls_sizes() -> None:
    buckets = make_buckets(1024, multiple=64, max_aspect=2.5)
    sizes = {(bucket.height, bucket.width) for bucket in buckets}
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536)} <= sizes
    assert all(side % 64 == 0 for size in sizes for side in size)
    assert all(height * width <= 1024**2 for height, width in sizes)
