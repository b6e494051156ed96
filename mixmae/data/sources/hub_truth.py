"""What Parquet files in Hugging Face's layouts know about pixels and objects.

Segmentation: beside the image a second column of image files, `annotation`, `label`, `mask` or the like, whose pixels
are class indices. What they mean is said by the files that say it for folders (masks.py: masks.json, classes.txt), by
id2label.json, which many such sets have, or by the values themselves; scene_parse_150 is known by its column
scene_category.

Detection: a column `objects` of boxes and classes, a list of structs or a struct of lists. Names of classes are those
of the metadata that `datasets` writes. Boxes are x y width height unless that makes no sense.

The schema tells whether there is something to read. What it means takes reading columns of all files, and is found out
when a dense task asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from mixmae.data.account import Note, Tally, escaped
from mixmae.data.images.decode import DecodeError, image_size
from mixmae.data.source import DataError
from mixmae.data.sources.masks import (
    LOOKED_AT,
    NAME_FILES,
    RULE_FILE,
    MaskRule,
    read_values,
    refuse_hopeless,
    rule_of_folder,
    rule_of_values,
)
from mixmae.data.sources.objects.files import as_objects
from mixmae.data.sources.objects.raw import RawObject, boxes_are_corners, clean
from mixmae.data.sources.storage import Storage
from mixmae.data.truth import DenseClasses, Truth, encode_map, fitted

ID2LABEL_FILE = "id2label.json"
_MASK_COLUMNS = (
    *("annotation", "annotations", "label", "labels", "mask", "masks", "label_map", "seg_map", "semantic_mask"),
    *("segmentation", "segmentation_map", "segmentation_mask", "semantic_segmentation"),
)
_OBJECT_COLUMNS = ("objects", "object", "annotations", "annotation")
_FIELDS = {
    "box": ("bbox", "bboxes", "box", "boxes"),
    "category": ("category", "category_id", "categories", "label", "labels", "class", "class_id", "class_label"),
    "area": ("area", "areas"),
    "number": ("id", "ids", "bbox_id", "annotation_id"),
    "crowd": ("iscrowd", "is_crowd"),
    "shape": ("segmentation", "segmentations"),
}
_FACTS = ("image_id", "height", "width")
_ANYWHERE = (10**9, 10**9)
"""The size of an image that is not known: everything is inside."""

Row = Mapping[str, Any]
ReadRows = Callable[[Sequence[str], bool], Iterator[Row]]
"""(columns, whether also of the other splits) -> rows as Python has them, in storage order."""


@dataclass(frozen=True, kw_only=True)
class HubColumns:
    """Where the truth is, as a schema tells."""

    masks: tuple[str, ...] = ()
    """Columns of class-index maps; more than one is too many."""
    objects: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    """Of the objects: the field's own name by ours, a key of _FIELDS."""
    names: tuple[str, ...] | None = None
    """Of the objects' classes."""
    facts: tuple[str, ...] = ()
    """Those of image_id, height and width that are there."""
    is_ade: bool = False

    @property
    def columns(self) -> list[str]:
        """All that a row's truth is read from."""
        return [*self.masks, *([self.objects] if self.objects else []), *self.facts]

    @property
    def is_sized(self) -> bool:
        return {"height", "width"} <= set(self.facts)


def find_columns(schema: pa.Schema, image_column: str) -> HubColumns | None:
    """The columns with truth; None if there are none."""
    masks = tuple(
        name
        for name in _MASK_COLUMNS
        if name != image_column and name in schema.names and _holds_files(schema.field(name).type)
    )
    objects, fields = None, {}
    for name in _OBJECT_COLUMNS:
        if name in schema.names:
            fields = _fields(schema.field(name).type)
            if {"box", "category"} <= fields.keys():
                objects = name
                break
    if not masks and objects is None:
        return None
    return HubColumns(
        masks=masks,
        objects=objects,
        fields=fields if objects else {},
        names=_class_names(schema, objects, fields["category"]) if objects else None,
        facts=tuple(name for name in _FACTS if name in schema.names and pa.types.is_integer(schema.field(name).type)),
        is_ade=masks == ("annotation",) and "scene_category" in schema.names,
    )


def _holds_files(kind: pa.DataType) -> bool:
    """Whether a column's cells are image files as `datasets` stores them."""
    index = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    stored = kind.field(index).type if index >= 0 else pa.null()
    return bool(pa.types.is_binary(stored) or pa.types.is_large_binary(stored))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_numbers(kind: pa.DataType) -> bool:
    """Whether a type is lists of numbers, of whatever depth."""
    inner = kind
    while _is_list(inner):
        inner = inner.value_type
    return inner != kind and bool(pa.types.is_floating(inner) or pa.types.is_integer(inner))


def _fields(kind: pa.DataType) -> dict[str, str]:
    """The fields of objects in a list of structs or a struct of lists; empty for any other type."""
    struct = kind.value_type if _is_list(kind) else kind
    if not pa.types.is_struct(struct):
        return {}
    there = [struct.field(index) for index in range(struct.num_fields)]
    if not _is_list(kind) and not any(_is_list(item.type) for item in there):
        return {}
    names = {item.name for item in there if item.name not in _FIELDS["box"] or _is_numbers(item.type)}
    found = {ours: next((name for name in theirs if name in names), "") for ours, theirs in _FIELDS.items()}
    return {ours: name for ours, name in found.items() if name}


def _class_names(schema: pa.Schema, column: str, category: str) -> tuple[str, ...] | None:
    """The names that `datasets` keeps for the classes of objects, wherever its version nests them."""

    def names_in(node: Any) -> Any:
        if isinstance(node, dict):
            return node["names"] if "names" in node else names_in(node.get("feature"))
        return names_in(node[0]) if isinstance(node, list) and node else None

    def find(node: Any) -> Any:
        if isinstance(node, dict) and category in node:
            return names_in(node[category])
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return next((found for found in map(find, inside) if found), None)

    try:
        names = find(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column])
        if isinstance(names, dict):
            names = [names[key] for key in sorted(names, key=int)]
        return tuple(escaped(str(name)) for name in names) if names else None
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class HubTruth:
    """What the columns mean."""

    columns: HubColumns
    dense: DenseClasses
    rule: MaskRule | None
    index: Mapping[Any, int]
    """Class of each value of the objects' categories."""
    corners: bool
    """Boxes are x0 y0 x1 y1."""
    notes: tuple[Note, ...]

    def truth(self, row: Row, data: bytes, where: str) -> Truth:
        """The truth of a row, upright as its image is.   Args: data: the image file."""
        columns = self.columns
        number = row.get("image_id")
        image_id = number if isinstance(number, int) and number >= 0 else -1
        try:
            upright = image_size(data)
        except DecodeError:
            return Truth(image_id=image_id, problem="its image cannot be read")  # it is counted as broken
        size, segmentation, objects = _size(row) or upright, b"", None
        try:
            if self.rule is not None:
                indices = self.rule.apply(read_values(_mask(row[columns.masks[0]])))
                segmentation = encode_map(indices)
            if columns.objects is not None:
                raw = self.raw_objects(row, size, Tally(), where)
                lost = 0 if columns.is_sized else len(self.raw_objects(row, _ANYWHERE, Tally(), where)) - len(raw)
                if lost:
                    raise DecodeError(f"{lost} of its {len(raw) + lost} boxes lie outside of the image")
                objects = as_objects(raw, size, shares=False)
        except (DecodeError, ValueError, TypeError) as error:
            return Truth(image_id=image_id, problem=f"{error}")
        return fitted(Truth(segmentation=segmentation, objects=objects, image_id=image_id, size=size), data, data)

    def raw_objects(self, row: Row, size: tuple[int, int], tally: Tally, where: str) -> list[RawObject]:
        """A row's objects, cleaned; what is left out is counted.   Raises: DecodeError if their lists do not fit."""
        return _raw_objects(self.columns, row, size, self.index, tally, where, corners=self.corners)


def learn_truth(columns: HubColumns, read: ReadRows, image_column: str, storage: Storage, root: str) -> HubTruth:
    """Find out what the columns mean.

    Args: read: reads rows of the files.  root: the folder that was named, where files may say it.
    Raises: DataError where that is not clear, or nothing can be used.
    """
    rule, tally = None, Tally()
    shown = storage.shown(root)
    if columns.masks:
        rule = _mask_rule(columns, read, storage, root)
    index: dict[Any, int] = {}
    classes: tuple[str, ...] | None = None
    ids: tuple[int, ...] = ()
    corners = False
    if columns.objects is not None:
        index, classes, ids = _object_classes(columns, read, shown)
        corners = boxes_are_corners(_boxes(columns, read, image_column), shown)
        wanted = [columns.objects, *columns.facts]
        count = 0
        for number, row in enumerate(read(wanted, False)):
            where, size = f"row {number} of {shown}", _size(row) or _ANYWHERE
            try:
                count += len(_raw_objects(columns, row, size, index, tally, where, corners=corners))
            except DecodeError as error:
                tally.add("images have objects that cannot be read and are not used", f"{where}: {error}")
        if corners:
            what = "boxes are corners (x0 y0 x1 y1) where Hugging Face's are x y width height, and are read as corners"
            tally.add(what, shown, count=count)
    return HubTruth(
        columns=columns,
        dense=DenseClasses(pixels=rule.classes if rule else None, objects=classes, object_ids=ids),
        rule=rule,
        index=index,
        corners=corners,
        notes=tally.notes,
    )


def rule_facts(storage: Storage, root: str) -> list[str]:
    """The content of the files that say what masks mean, for a digest."""
    facts = []
    for name in (RULE_FILE, *NAME_FILES, ID2LABEL_FILE):
        try:
            facts.append(f"{name} {storage.read_file(f'{root}/{name}')!r}")
        except OSError:
            continue
    return facts


def _mask_rule(columns: HubColumns, read: ReadRows, storage: Storage, root: str) -> MaskRule:
    """What the values of the masks mean.   Raises: DataError."""
    shown = storage.shown(root)
    if len(columns.masks) > 1:
        raise DataError(
            f"{shown} has several columns of masks, {' and '.join(columns.masks)}: keep one of them in the files"
        )
    (name,) = columns.masks
    rule = rule_of_folder(storage, root, "ADE20K" if columns.is_ade else "") or _id2label(storage, root)
    if rule is None:
        print(f"note: reading all masks of {shown} once, to know their classes; classes.txt would say them", flush=True)
        found = np.zeros(256, dtype=np.bool_)
        for row in read([name], True):
            try:
                found |= np.bincount(read_values(_mask(row[name])).ravel(), minlength=256) > 0
            except DecodeError:  # found again, and counted, when it is read
                continue
        rule = rule_of_values(tuple(np.flatnonzero(found).tolist()), shown)
    looked_at = {f"row {number}": row[name] for number, row in enumerate(islice(read([name], False), LOOKED_AT))}
    there = [(where, bytes(cell["bytes"])) for where, cell in looked_at.items() if cell and cell.get("bytes")]
    if there:  # not in a split whose masks are not public
        refuse_hopeless(rule, there, shown)
    return rule


def _id2label(storage: Storage, root: str) -> MaskRule | None:
    """The names in id2label.json, by value; 255 is ignored.   Raises: DataError if the file is not that."""
    try:
        content = json.loads(storage.read_file(f"{root}/{ID2LABEL_FILE}"))
        known = {int(value): escaped(str(name)) for value, name in content.items()}
    except OSError:
        return None
    except (ValueError, AttributeError) as error:
        raise DataError(
            f'{storage.shown(root)}/{ID2LABEL_FILE} is not {{"0": "road", "1": "car", ...}} ({error}): correct it, or '
            f"say what values mean in {RULE_FILE}"
        ) from error
    known.pop(255, None)
    return MaskRule(classes=tuple(known[value] for value in sorted(known)), values=tuple(sorted(known)))


def _mask(cell: Any) -> bytes:
    """The file of a mask.   Raises: DecodeError if it is not in the table."""
    data = (cell or {}).get("bytes")
    if not data:
        raise DecodeError("it has no mask in the file" + (", only its path" if cell and cell.get("path") else ""))
    return bytes(data)


def _size(row: Row) -> tuple[int, int] | None:
    """(h, w) as the table says; None if it does not."""
    height, width = row.get("height"), row.get("width")
    return (height, width) if height and width and min(height, width) > 0 else None


def _items(columns: HubColumns, row: Row) -> list[Mapping[str, Any]]:
    """The objects of a row, one by one, in our names.   Raises: DecodeError."""
    value, names = row[columns.objects or ""], columns.fields
    if value is None:
        raise DecodeError("nothing is known about its objects")
    if isinstance(value, list):
        return [{ours: item.get(name) for ours, name in names.items()} for item in value if item is not None]
    lists = {ours: value[name] for ours, name in names.items() if value.get(name) is not None}
    if len({len(part) for part in lists.values()}) > 1 or not {"box", "category"} <= lists.keys():
        lengths = ", ".join(f"{len(part)} of {names[ours]}" for ours, part in lists.items())
        raise DecodeError(f"the lists of its objects have other lengths ({lengths})")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _category(value: Any) -> Any:
    """A class as it is looked up: a number or a name; None for none."""
    if isinstance(value, str):
        return escaped(value.strip()) or None
    return int(value) if isinstance(value, int | float) and value == value and value == int(value) else None


def _object_classes(
    columns: HubColumns, read: ReadRows, shown: str
) -> tuple[dict[Any, int], tuple[str, ...], tuple[int, ...]]:
    """The class of each value, the names of the classes, and their own numbers.   Raises: DataError."""
    if columns.names is not None:
        numbers = tuple(range(len(columns.names)))
        names = columns.names
        if len(set(names)) < len(names):
            names = tuple(f"{number} {name}" for number, name in zip(numbers, names, strict=True))
        both: dict[Any, int] = {number: number for number in numbers}
        return both | dict(zip(columns.names, numbers, strict=True)), names, numbers
    values: set[Any] = set()
    for row in read([columns.objects or ""], True):
        try:
            values |= {_category(item["category"]) for item in _items(columns, row)}
        except DecodeError:
            continue
    values = {value for value in values if value is not None and (isinstance(value, str) or value >= 0)}
    if not values or len({isinstance(value, str) for value in values}) > 1:
        raise DataError(
            f"{shown} has no object with a class in {columns.objects}.{columns.fields['category']}: store a number or "
            "a name for each object"
        )
    ordered = sorted(values)
    ids = () if isinstance(ordered[0], str) else tuple(ordered)
    return {value: label for label, value in enumerate(ordered)}, tuple(map(str, ordered)), ids


def _boxes(columns: HubColumns, read: ReadRows, image_column: str) -> Iterator[tuple[Sequence[float], tuple[int, int]]]:
    """Boxes with the sizes of their images: of all rows where the table has sizes, else of a few images."""
    wanted = [columns.objects or "", *columns.facts]
    rows: Iterable[Row] = read(wanted, False)
    if not columns.is_sized:
        rows = islice(read([*wanted, image_column], False), LOOKED_AT)
    for row in rows:
        try:
            cell = row.get(image_column)
            size = _size(row) or image_size((cell.get("bytes") if isinstance(cell, dict) else cell) or b"")
            items = _items(columns, row)
        except DecodeError:
            continue
        for item in items:
            box = item.get("box")
            if box is not None and len(box) == 4 and None not in box:
                yield box, size


def _raw_objects(
    columns: HubColumns,
    row: Row,
    size: tuple[int, int],
    index: Mapping[Any, int],
    tally: Tally,
    where: str,
    *,
    corners: bool,
) -> list[RawObject]:
    found = []
    for item in _items(columns, row):
        box, label, shape = item.get("box"), index.get(_category(item.get("category"))), item.get("shape")
        if label is None:
            tally.add("objects without a known class are left out", where)
            continue
        if box is None or len(box) != 4 or None in box:
            tally.add("boxes of other than four numbers are left out", where)
            continue
        if not corners:
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        rle = shape if isinstance(shape, dict) and shape.get("counts") and shape.get("size") else None
        if rle is not None and size != _ANYWHERE and tuple(rle["size"]) != size:
            tally.add("run-length masks of another size than their image are left out", where)
            rle = None
        polygons = shape if isinstance(shape, list) else []
        if polygons and not isinstance(polygons[0], list):  # a single one, without its list
            polygons = [polygons]
        area, number = item.get("area"), item.get("number")
        raw = clean(
            tally,
            where,
            size,
            box=box,
            polygons=polygons,
            rle=rle,
            label=label,
            crowd=bool(item.get("crowd") or False),
            area=None if area is None else float(area),
            number=number if isinstance(number, int) else 0,
        )
        if raw is not None:
            found.append(raw)
    return found
