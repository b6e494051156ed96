"""What is known about the pixels of an image: a class for each, or objects with boxes and masks.

A source that knows it is a DenseSource. The truth of a row is read on its own, because most runs need none.

Legend: H W an image's size in pixels, upright; n objects of an image.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mixmae.data.chunks import Int64Array, group_by_chunk
from mixmae.data.images.decode import DecodeError, Uint8Array, image_size, jpeg_orientation, turn
from mixmae.data.rle import decode_rle, encode_rle
from mixmae.data.source import DataError, Source

IGNORE = 255
"""The value of pixels that no class is asked of: they are in no loss and in no figure."""
MAX_CLASSES = 255
"""A class-index map is stored in 8 bits."""


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of an image."""

    boxes: NDArray[np.float32]
    """(n, 4) float32, x0 y0 x1 y1 in pixels, the last two exclusive."""
    labels: Int64Array
    """(n,) int64, index into the source's object_classes."""
    areas: NDArray[np.float32]
    """(n,) float32, pixels of the mask."""
    crowd: NDArray[np.bool_]
    """(n,) bool: a region of many objects that are not told apart (COCO's iscrowd)."""
    ids: Int64Array
    """(n,) int64, of the annotations in their own file."""
    masks: tuple[bytes, ...]
    """n masks of the image's size, as in rle.py; empty bytes where there is a box alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """What is known about one image."""

    segmentation: bytes = b""
    """A PNG of class indices of the image's size, IGNORE where there is none; empty if it is not known."""
    objects: Objects | None = None
    """None if they are not known."""
    image_id: int = -1
    """The image's number in its own collection, which predictions are written with; -1 if it has none."""
    size: tuple[int, int] = (0, 0)
    """(H, W) that boxes and masks are for."""
    problem: str = ""
    """Why nothing is known, if that is known: the mask is gone, or cannot be used."""


@dataclass(frozen=True, kw_only=True)
class DenseClasses:
    """What the truth of a source says: the names of the classes, and where they come from."""

    pixels: tuple[str, ...] | None = None
    """Classes of the class-index maps; None if there are no maps."""
    objects: tuple[str, ...] | None = None
    """Classes of the objects; None if there are none."""
    object_ids: tuple[int, ...] = field(default=())
    """The numbers of the objects' classes in their own file, such as COCO's 1 to 90."""

    def __post_init__(self) -> None:
        for kind in (self.pixels, self.objects):
            if kind is not None and not 1 <= len(kind) <= MAX_CLASSES:
                raise DataError(f"there are {len(kind)} classes: 1 to {MAX_CLASSES} can be told apart")

    def to_json(self) -> dict[str, Any]:
        """For the metadata of shards."""
        return {name: list(value) for name, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, content: Any) -> DenseClasses:
        """Read what to_json wrote."""
        return cls(**{name: tuple(value) for name, value in content.items()})


@runtime_checkable
class DenseSource(Source, Protocol):
    """A source that knows more about its images than one class."""

    @property
    def dense(self) -> DenseClasses | None:
        """What is known; None: nothing."""

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        """What is known about rows of one chunk.   Args, Raises: as Source.read."""


def dense_classes(source: Source) -> DenseClasses | None:
    """What a source knows about its pixels; None: nothing."""
    return source.dense if isinstance(source, DenseSource) else None


def read_truths(source: DenseSource, rows: Sequence[int] | Int64Array) -> list[Truth]:
    """What is known about any rows of a source, in the order asked for, each chunk read once."""
    chunks, within = source.chunks.locate(rows)
    truths: dict[int, Truth] = {}
    for group in group_by_chunk(chunks):
        truths |= zip(group.tolist(), source.read_truth(int(chunks[group[0]]), within[group]), strict=True)
    return [truths[index] for index in range(len(chunks))]


def with_maps(source: Source) -> DenseSource:
    """The source, if it has class-index maps.   Raises: DataError if it has not."""
    known = dense_classes(source)
    if known is None or known.pixels is None:
        raise DataError(
            f"{source.name} has no masks of classes, and segmentation needs them: give images/ beside masks/, ADE20K, "
            "Cityscapes or Pascal VOC as they unpack, or shards that make_shards made of one of them "
            "(docs/segmentation.md)."
        )
    assert isinstance(source, DenseSource)
    return source


def fitted(truth: Truth, original: bytes, stored: bytes) -> Truth:
    """What is known about an image as it is stored: turned and shrunk with it.

    What was drawn on the pixels of a photo that its EXIF orientation turns by a quarter has the other sides: it is
    turned, too. Where both have the same sides, it is taken to be upright.

    Args: original: the image file that it is for.  stored: the one that takes its place, perhaps smaller.
    Returns: a truth with a `problem` where the two do not belong together.
    """
    if not truth.segmentation and truth.objects is None:
        return truth
    try:
        size, wanted = image_size(original), image_size(stored)
    except DecodeError:
        return truth  # the image is counted as broken
    orientation = jpeg_orientation(original) if original[:2] == b"\xff\xd8" else 1
    try:
        indices = _fitted_map(truth.segmentation, size, wanted, orientation) if truth.segmentation else b""
        objects = None if truth.objects is None else _fitted_objects(truth, truth.objects, size, wanted, orientation)
    except DecodeError as error:
        return replace(truth, segmentation=b"", objects=None, problem=str(error))
    return replace(truth, segmentation=indices, objects=objects, size=wanted)


def _fitted_map(content: bytes, size: tuple[int, int], wanted: tuple[int, int], orientation: int) -> bytes:
    """A map of an image of `size`, turned and shrunk.   Raises: DecodeError if it is of another size."""
    with Image.open(io.BytesIO(content)) as image:
        indices = np.array(image)
    if indices.shape != size and indices.shape == size[::-1] and orientation >= 5:
        indices = np.ascontiguousarray(turn(indices[..., None], orientation)[..., 0])
    if indices.shape != size:
        there, here = (f"{height} x {width}" for height, width in (indices.shape, size))
        raise DecodeError(f"its mask is of {there} pixels and the image of {here}")
    if wanted != size:
        indices = np.array(Image.fromarray(indices).resize((wanted[1], wanted[0]), Image.Resampling.NEAREST))
    return encode_map(indices)


def _fitted_objects(
    truth: Truth, objects: Objects, size: tuple[int, int], wanted: tuple[int, int], orientation: int
) -> Objects:
    """Objects of an image of `size`, turned and shrunk.   Raises: DecodeError if they are for another size."""
    lying = truth.size != size and truth.size == size[::-1] and orientation >= 5
    if truth.size != size and not lying and len(objects.labels):
        there, here = (f"{height} x {width}" for height, width in (truth.size, size))
        raise DecodeError(f"its objects are for an image of {there} pixels, and it has {here}")
    if (not lying and wanted == size) or not len(objects.labels):
        return objects
    boxes = _turned_boxes(objects.boxes, truth.size, orientation) if lying else objects.boxes
    factors = (wanted[1] / size[1], wanted[0] / size[0])

    def moved(counts: bytes) -> bytes:
        mask = decode_rle(counts, truth.size)
        if lying:
            mask = turn(mask[..., None].view(np.uint8), orientation)[..., 0].view(np.bool_)
        if wanted != size:
            picture = Image.fromarray(np.ascontiguousarray(mask)).resize(
                (wanted[1], wanted[0]), Image.Resampling.NEAREST
            )
            mask = np.asarray(picture)
        return encode_rle(mask)

    return replace(
        objects,
        boxes=(boxes * np.array([*factors, *factors])).astype(np.float32),
        areas=(objects.areas * factors[0] * factors[1]).astype(np.float32),
        masks=tuple(moved(counts) if counts else b"" for counts in objects.masks),
    )


def _turned_boxes(boxes: NDArray[np.float32], size: tuple[int, int], orientation: int) -> NDArray[np.float32]:
    """Boxes on an image (h, w) as `turn` turns it, for the orientations that exchange its sides."""
    height, width = size
    x0, y0, x1, y1 = boxes[:, 1], boxes[:, 0], boxes[:, 3], boxes[:, 2]  # exchanged: the image is height wide
    if orientation in (6, 7):
        x0, x1 = height - x1, height - x0
    if orientation in (7, 8):
        y0, y1 = width - y1, width - y0
    return np.stack([x0, y0, x1, y1], axis=1)


def encode_map(indices: Uint8Array) -> bytes:
    """A class-index map (H, W) uint8 as a PNG."""
    out = io.BytesIO()
    Image.fromarray(indices).save(out, "PNG")
    return out.getvalue()


def decode_map(truth: Truth, size: tuple[int, int], num_classes: int) -> Uint8Array:
    """The class-index map of an image.

    Args: size: (H, W) of the image.  num_classes: of the source.
    Returns: (H, W) uint8, in [0, num_classes) or IGNORE.
    Raises: DecodeError if there is none, or it does not fit.
    """
    if not truth.segmentation:
        raise DecodeError(truth.problem or "it has no mask")
    try:
        with Image.open(io.BytesIO(truth.segmentation)) as image:
            indices = np.array(image)
    except Exception as error:  # codecs raise whatever they like on damaged bytes
        raise DecodeError(f"its mask does not decode: {error}") from error
    if indices.dtype != np.uint8 or indices.ndim != 2:
        raise DecodeError(f"its mask is {indices.dtype} of shape {indices.shape}, not 8-bit class indices")
    if indices.shape != size:
        there, here = (f"{height} x {width}" for height, width in (indices.shape, size))
        raise DecodeError(f"its mask is of {there} pixels and the image of {here}")
    if ((indices >= num_classes) & (indices != IGNORE)).any():
        wrong = int(indices[(indices >= num_classes) & (indices != IGNORE)].max())
        raise DecodeError(f"its mask has the class {wrong}, and there are {num_classes} (0 to {num_classes - 1})")
    return indices
