"""Parquet shards in the Hugging Face ImageNet schema: how they are written, with their manifest.

Columns: image, a struct of bytes (an image file) and path; label, int64, where there are classes; restart_offsets,
the byte offsets of the restart intervals of a restart-tile JPEG (tiles.py), null for any other file; the built-in
shapes add box and mask. Sets for dense tasks (truth.py) have image_id, height and width, and segmentation, a PNG of
class indices, or objects, a struct of lists, or both. Row groups are small, so that a reader fetches little more than
it needs; pages are not compressed, because image files are, and a sidecar (shard_index.py) holds the address of every
image's bytes. The manifest is written last: a set with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mixmae.data.sources.contents import file_digest
from mixmae.data.sources.open import MANIFEST_NAME
from mixmae.data.sources.parquet import DENSE_KEY, OBJECTS_COLUMN, RESTART_COLUMN, SEGMENTATION_COLUMN
from mixmae.data.sources.shard_index import index_path, write_index
from mixmae.data.truth import DenseClasses, Truth
from mixmae.writing import write_json, writing

ROW_GROUP_ROWS = 64
"""Rows per row group: the chunk that a reader fetches at once."""
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class StoredImage:
    """One row of a shard."""

    data: bytes
    """The image file's bytes as they are."""
    path: str
    """The file's path below the root of its collection."""
    label: int = -1
    box: tuple[int, int, int, int] | None = None
    """x0, y0, x1, y1 in pixels, the last two exclusive."""
    mask: bytes | None = None
    """A PNG of the image's size, nonzero on the object."""
    restart_offsets: NDArray[np.uint32] | None = None
    """(num_intervals + 1,) uint32: where the restart intervals begin in `data`, if it is a restart-tile JPEG."""
    truth: Truth | None = None
    """What is known about its pixels, in a set for dense tasks."""


@dataclass(frozen=True)
class ShardFile:
    """A finished shard, as the manifest lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


def shard_schema(
    class_names: Sequence[str] | None,
    *,
    labelled: bool = False,
    with_masks: bool = False,
    dense: DenseClasses | None = None,
) -> pa.Schema:
    """The Arrow schema of a shard, with the class names where Hugging Face's `datasets` looks for them.

    Args: labelled: there are labels, even if their classes have no names.  dense: what is known about pixels.
    """
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", struct)]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if class_names is not None:
        fields.append(pa.field("label", pa.int64()))
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    elif labelled:
        fields.append(pa.field("label", pa.int64()))
        features["label"] = {"dtype": "int64", "_type": "Value"}
    fields.append(pa.field(RESTART_COLUMN, pa.list_(pa.uint32())))
    features[RESTART_COLUMN] = {"feature": {"dtype": "uint32", "_type": "Value"}, "_type": "Sequence"}
    if with_masks:
        fields += [pa.field("box", pa.list_(pa.int64(), 4)), pa.field("mask", struct)]
        features["box"] = {"feature": {"dtype": "int64", "_type": "Value"}, "length": 4, "_type": "Sequence"}
        features["mask"] = {"_type": "Image"}
    metadata = {}
    if dense is not None:
        metadata[DENSE_KEY] = json.dumps(dense.to_json())
        fields += [pa.field(name, kind) for name, kind in _SIZES.items()]
        features |= {name: {"dtype": str(kind), "_type": "Value"} for name, kind in _SIZES.items()}
        if dense.pixels is not None:
            fields.append(pa.field(SEGMENTATION_COLUMN, struct))
            features[SEGMENTATION_COLUMN] = {"_type": "Image"}
        if dense.objects is not None:
            lists = {name: pa.list_(kind) for name, kind in _OBJECTS.items()}
            fields.append(pa.field(OBJECTS_COLUMN, pa.struct(list(lists.items()))))
            kinds: dict[str, Any] = {name: {"dtype": str(kind), "_type": "Value"} for name, kind in _OBJECTS.items()}
            kinds["bbox"] = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}
            kinds["category"] = {"names": list(dense.objects), "_type": "ClassLabel"}
            features[OBJECTS_COLUMN] = {name: {"feature": kind, "_type": "Sequence"} for name, kind in kinds.items()}
    metadata["huggingface"] = json.dumps({"info": {"features": features}})
    return pa.schema(fields, metadata=metadata)


_SIZES = {"image_id": pa.int64(), "height": pa.int32(), "width": pa.int32()}
_OBJECTS = {
    "bbox": pa.list_(pa.float32(), 4),  # x0 y0 x1 y1
    "category": pa.int64(),
    "area": pa.float32(),
    "iscrowd": pa.bool_(),
    "id": pa.int64(),
    "rle": pa.binary(),
}


def shard_name(split: str, number: int, count: int) -> str:
    """The file name of a shard, such as train-00000-of-00004.parquet."""
    return f"{split}-{number:05d}-of-{count:05d}.parquet"


def write_shard(path: Path, images: Iterable[StoredImage], schema: pa.Schema) -> ShardFile:
    """Write one shard and its sidecar.   Returns: its entry for the manifest."""
    held = list(images)  # the sidecar is made by finding their bytes again
    labelled = "label" in schema.names
    with writing(path) as temporary:
        # Without statistics and dictionaries of the image bytes, which would only repeat them.
        writer = pq.ParquetWriter(
            temporary, schema, compression="none", use_dictionary=False, write_statistics=["label"]
        )
        with writer:
            for start in range(0, len(held), ROW_GROUP_ROWS):
                writer.write_table(_table(held[start : start + ROW_GROUP_ROWS], schema))
            # In the footer, so that shards of one size differ there, too: a sidecar belongs to a footer.
            writer.add_key_value_metadata({"mixmae.contents": _contents(held)})
        sidecar = Path(index_path(str(path)))
        sidecar.unlink(missing_ok=True)
        write_index(
            temporary,
            sidecar,
            [image.data for image in held],
            [image.label if labelled else -1 for image in held],
            [image.path for image in held],
            [image.restart_offsets for image in held],
        )  # before the shard has its name: where a shard is, its sidecar is
    return ShardFile(path.name, len(held), path.stat().st_size, file_digest(str(path)))


def describe_shard(path: Path) -> ShardFile:
    """The manifest's entry for a shard that is already there."""
    return ShardFile(path.name, pq.read_metadata(path).num_rows, path.stat().st_size, file_digest(str(path)))


def write_manifest(
    folder: Path,
    *,
    splits: dict[str, list[ShardFile]],
    class_names: Sequence[str] | None,
    summaries: dict[str, dict[str, Any]],
    fingerprint: str,
    origin: dict[str, Any],
    met: dict[str, Any],
) -> None:
    """Write manifest.json: rows, bytes and checksums of every split, the classes, a digest of all, and the origin.

    Args:
        summaries: of every split, see Summary.as_dict; its pixel statistics are those of a sample.
        fingerprint: of what the shards were made from, by which a later run knows that they are up to date.
        met: what was met in their source, see Account.as_json.
    """
    checksums = [shard.sha256 for shards in splits.values() for shard in shards]
    manifest = {
        "format": MANIFEST_FORMAT,
        "digest": hashlib.sha256("\n".join(checksums).encode()).hexdigest()[:16],
        "splits": {
            split: {
                "rows": sum(shard.rows for shard in shards),
                "bytes": sum(shard.bytes for shard in shards),
                "files": [vars(shard) for shard in shards],
                "summary": summaries[split],
            }
            for split, shards in splits.items()
        },
        "classes": list(class_names) if class_names is not None else None,
        "fingerprint": fingerprint,
        "origin": origin,
        "met": met,
    }
    write_json(folder / MANIFEST_NAME, manifest, indent=1)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object of ours, or None if it is missing or not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _contents(images: Sequence[StoredImage]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{len(image.data)} {image.label} {image.path}\n".encode())
        digest.update(image.data)
        if image.truth is not None:
            digest.update(image.truth.segmentation)
    return digest.hexdigest()


def _objects(truth: Truth | None) -> dict[str, Any] | None:
    """The objects of an image as lists; a box alone has an empty mask."""
    if truth is None or truth.objects is None:
        return None
    objects = truth.objects
    return {
        "bbox": objects.boxes.tolist(),
        "category": objects.labels.tolist(),
        "area": objects.areas.tolist(),
        "iscrowd": objects.crowd.tolist(),
        "id": objects.ids.tolist(),
        "rle": list(objects.masks),
    }


def _table(images: list[StoredImage], schema: pa.Schema) -> pa.Table:
    truths = [image.truth for image in images]
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": image.data, "path": image.path} for image in images],
        "label": [image.label for image in images],
        "box": [image.box for image in images],
        "mask": [{"bytes": image.mask, "path": None} for image in images],
        RESTART_COLUMN: [image.restart_offsets for image in images],
        "image_id": [truth.image_id if truth else -1 for truth in truths],
        "height": [truth.size[0] if truth else 0 for truth in truths],
        "width": [truth.size[1] if truth else 0 for truth in truths],
        SEGMENTATION_COLUMN: [
            {"bytes": truth.segmentation or None if truth else None, "path": None} for truth in truths
        ],
        OBJECTS_COLUMN: list(map(_objects, truths)),
    }
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
