"""Images decoded and cropped by threads, ahead of the encoder that takes them in batches."""

import io
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.folder.content_hash import image_digest
from latentdiff.data.folder.folder import Folder
from latentdiff.data.images import resize_and_crop, resized_and_corner
from latentdiff.image_io import ImageError, load_image
from latentdiff.models.conditioning import Size, make_time_ids
from latentdiff.program import program

BATCHES_AHEAD = 3


@dataclass(frozen=True)
class Item:
    """An image to decode: its record's index, its size in pixels, and its crop."""

    index: int
    height: int
    width: int
    crop: tuple[float, float]
    flip: bool
    background: tuple[int, int, int]


@dataclass(frozen=True)
class CropPlan:
    """How each image is cropped: resized until it covers its size, then cut.

    sizes: (N, 2) (height, width) in pixels, multiples of the VAE's factor. places: where crops lie
    in the room there is, each in [0, 1]; (0.5,) is the centre, () anywhere. has_room: (N,) which
    images have room at all, so that the others are cropped once only; None: all may have.
    """

    sizes: np.ndarray
    places: tuple[float, ...] = (0.5,)
    has_room: np.ndarray | None = None
    background: tuple[int, int, int] = (255, 255, 255)

    def check(self, folder: Folder, *, factor: int) -> None:
        """Raise ValueError where the plan does not match the folder or the VAE."""
        for name, table in (("sizes", self.sizes), ("has_room", self.has_room)):
            if table is not None and len(table) != len(folder):
                raise ValueError(
                    f"{name} has {len(table):,} rows, expected {len(folder):,}: a row for each "
                    "record of the folder"
                )
        if len(folder) and (self.sizes.min() < factor or (self.sizes % factor).any()):
            raise ValueError(f"sizes must be multiples of {factor}, the VAE's factor")
        if not all(0 <= place <= 1 for place in self.places):
            raise ValueError(f"places must be in [0, 1], got {self.places}")

    def variant(self, u: float) -> int:
        """Choose one of `places` by a random u in [0, 1)."""
        return int(u * len(self.places))

    def item(self, index: int, *, u: float, flip: bool) -> Item:
        """Return the crop of one record's image that a random u in [0, 1) chooses."""
        height, width = self.sizes[index].tolist()
        place = self.places[self.variant(u)] if self.places else u
        if self.has_room is not None and not self.has_room[index]:
            place = 0.5
        return Item(int(index), height, width, (place, place), flip, self.background)

    def time_ids(self, index: int, original: Size, *, u: float, flip: bool) -> Tensor:
        """Return SDXL's sizes of the crop that a random u chooses, (6,): see `make_time_ids`.

        original: (height, width) of the image as it is stored, however small. The crop's corner is
        counted in the resized image, mirrored where the crop is, so that it is on the left of what
        the model sees.
        """
        item = self.item(index, u=u, flip=flip)
        size = item.height, item.width
        resized, (top, left) = resized_and_corner(
            original, height=item.height, width=item.width, crop=item.crop
        )
        if flip:
            left = resized[1] - item.width - left
        return make_time_ids(original, (top, left), size)


Batch = tuple[list[Item], Tensor]


def decode_ahead(
    folder: Folder,
    items: Iterable[Item],
    *,
    digests: np.ndarray | None,
    batch_size: int,
    num_threads: int,
) -> Iterator[Batch]:
    """Yield batches of items that follow one another and share a size, with pixels (B, H, W, 3)
    uint8.

    digests: (N, 32) `image_hashes` of the folder, to notice a change. Raises ValueError naming a
    file that has changed or cannot be read.
    """

    def load(item: Item) -> np.ndarray:
        digest = None if digests is None else digests[item.index].tobytes()
        return load_item(folder, item, digest=digest)

    def finish(batch: list[Item], waiting: list["Future[np.ndarray]"]) -> Batch:
        return batch, torch.from_numpy(np.stack([future.result() for future in waiting]))

    threads = ThreadPoolExecutor(num_threads)
    ahead: deque[tuple[list[Item], list[Future[np.ndarray]]]] = deque()
    try:
        for batch in batches_of(items, batch_size):
            ahead.append((batch, [threads.submit(load, item) for item in batch]))
            if len(ahead) > BATCHES_AHEAD:
                yield finish(*ahead.popleft())
        while ahead:
            yield finish(*ahead.popleft())
    finally:
        threads.shutdown(cancel_futures=True)


def batches_of(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Group items into batches of one image size; the last of a size may hold fewer."""
    batch: list[Item] = []
    for item in items:
        other = batch and (item.height, item.width) != (batch[0].height, batch[0].width)
        if other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def load_item(folder: Folder, item: Item, *, digest: bytes | None) -> np.ndarray:
    """Decode and crop one image: (H, W, 3) uint8."""
    try:
        data = folder.read_bytes(item.index)
        if digest is not None and image_digest(data) != digest:
            path = folder[item.index].path
            raise ValueError(f"{path} changes while it is encoded; start again")
        image = load_image(io.BytesIO(data), background=item.background)
    except (ImageError, OSError) as error:
        raise ValueError(
            f"{folder[item.index].path} cannot be encoded: {error}. {program()} inspect "
            f"{folder.root} --full finds all such files; fix or remove them"
        ) from error
    crop = resize_and_crop(
        image, height=item.height, width=item.width, crop=item.crop, flip=item.flip
    )
    return np.asarray(crop.image)
