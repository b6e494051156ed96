"""LabelMe: a JSON file beside each image, or in a folder of its own, with shapes that have a label by name.

Polygons, rectangles and circles are read, and masks that AI tools made. Shapes of one label and one group_id are parts
of one object. Labels that begin and end with "_" (_background_, __ignore__) are left out.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mixmae.data.account import Tally, escaped
from mixmae.data.rle import encode_rle
from mixmae.data.source import DataError
from mixmae.data.sources.objects.raw import RawImage, RawSet, clean, number_names
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile

_CIRCLE_POINTS = 64
_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def read_labelme(
    storage: Storage, root: str, beside: Sequence[StoredFile], images: Sequence[StoredFile]
) -> RawSet | None:
    """The objects of a set in LabelMe's form; None if it is not one.   Raises: DataError."""
    stems = {image.relative.rpartition(".")[0]: image.relative for image in images}
    files = [file for file in beside if file.relative.endswith(".json") and file.relative[:-5] in stems]
    contents = [(file, content) for file in files if (content := _read(storage, file)) is not None]
    tally = Tally()
    of_file = {file.path: stems[file.relative[:-5]] for file, _ in contents}
    if not contents:
        contents, of_file = _apart(storage, beside, images, tally)
    if not contents:
        return None
    entries: list[tuple[RawImage, dict[tuple[str, Any], dict[str, Any]]]] = []
    names: set[str] = set()
    for number, (file, content) in enumerate(contents):
        image = RawImage(name=of_file[file.path], size=_size(storage, file, content), image_id=number)
        parts = _parts(file, content, image, tally)
        names |= {label for label, _ in parts}
        entries.append((image, parts))
    for name in sorted({image.relative for image in images} - set(of_file.values())):
        tally.add("images have no JSON file and are left out", name, "save them in LabelMe, without shapes")
    index, ordered = number_names(names, storage.shown(root))
    splits: dict[str, list[RawImage]] = {}
    for image, parts in entries:
        for (label, _), values in parts.items():
            item = clean(tally, f"{label} in {image.name}", image.size, label=index[label], **values)
            if item is not None and item in image.objects:
                tally.add("objects that repeat another one are left out", f"{label} in {image.name}")
            elif item is not None:
                image.objects.append(item)
        named = filter(None, map(split_of_folder, image.name.split("/")[:-1]))
        splits.setdefault(next(named, "train"), []).append(image)
    return RawSet(
        title="LabelMe",
        splits=splits,
        class_names=ordered,
        class_ids=tuple(range(1, 1 + len(ordered))),
        tally=tally,
    )


def _apart(
    storage: Storage, beside: Sequence[StoredFile], images: Sequence[StoredFile], tally: Tally
) -> tuple[list[tuple[StoredFile, Any]], dict[str, str]]:
    """JSON files that are not beside their images: their contents, and the image of each by the file's path.

    An image is found by imagePath, or by its name where that is wrong and no other image has the same.
    """
    files = [file for file in beside if file.relative.endswith(".json")]
    if 2 * len(files) < len(images) or not _is_labelme(storage, files[0]):  # of some other kind
        return [], {}
    paths = {image.relative for image in images}
    by_stem: dict[str, list[str]] = {}
    for path in sorted(paths):
        by_stem.setdefault(posixpath.basename(path).rpartition(".")[0], []).append(path)
    contents, of_file = [], {}
    for file in files:
        content = _read(storage, file)
        if content is None:
            continue
        folder, stem = posixpath.split(file.relative[:-5])
        stated = posixpath.normpath(posixpath.join(folder, str(content.get("imagePath")).replace("\\", "/")))
        named = [stated] if stated in paths else by_stem.get(stem, [])
        if len(named) == 1:
            contents.append((file, content))
            of_file[file.path] = named[0]
        elif named:
            tally.add("annotations fit several images of one name and are left out", file.relative, "correct imagePath")
        else:
            tally.add("annotations of images that are not there are left out", file.relative, "correct imagePath")
    return contents, of_file


def _is_labelme(storage: Storage, file: StoredFile) -> bool:
    try:
        return _read(storage, file) is not None
    except DataError:
        return False


def _read(storage: Storage, file: StoredFile) -> Any:
    try:
        content = json.loads(storage.read_file(file.path))
    except (OSError, ValueError) as error:
        raise DataError(f"{storage.shown(file.path)} is not whole JSON ({error}): save it again") from error
    return content if isinstance(content, dict) and isinstance(content.get("shapes"), list) else None


def _size(storage: Storage, file: StoredFile, content: Any) -> tuple[int, int]:
    try:
        return int(content["imageHeight"]), int(content["imageWidth"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{storage.shown(file.path)} does not say imageHeight and imageWidth: save it again in LabelMe"
        ) from error


def _parts(file: StoredFile, content: Any, image: RawImage, tally: Tally) -> dict[tuple[str, Any], dict[str, Any]]:
    """The objects of an image by label and group: the values that `clean` takes."""
    found: dict[tuple[str, Any], dict[str, Any]] = {}
    assert image.size is not None
    for number, shape in enumerate(content["shapes"]):
        where = f"shape {number} of {file.relative}"
        try:
            label = escaped(str(shape["label"]).strip())
            kind = shape.get("shape_type") or "polygon"
            points = [(float(x), float(y)) for x, y in shape["points"]]
            group = shape.get("group_id")
        except (KeyError, TypeError, ValueError, AttributeError):
            tally.add("shapes without a label or points are left out", where)
            continue
        if not label or (label.startswith("_") and label.endswith("_")):
            tally.add("shapes of labels that are not objects are left out", f"{label} in {file.relative}")
            continue
        key = (label, f"alone {number}" if group is None else group)
        values = found.setdefault(key, {"box": None, "polygons": []})
        if kind == "mask":
            rle = _mask(shape.get("mask"), points, image.size)
            if rle is None:
                tally.add("masks that do not decode are left out", where)
                found.pop(key) if not values["polygons"] else None
                continue
            values |= {"rle": rle, "box": (points[0][0], points[0][1], points[1][0] + 1, points[1][1] + 1)}
        elif kind == "rectangle" and len(points) == 2:
            (x0, y0), (x1, y1) = points
            values["polygons"].append([x0, y0, x1, y0, x1, y1, x0, y1])
        elif kind == "circle" and len(points) == 2:
            (x, y), edge = points[0], points[1]
            radius = math.dist((x, y), edge)
            angles = [2 * math.pi * step / _CIRCLE_POINTS for step in range(_CIRCLE_POINTS)]
            values["polygons"].append(
                [value for angle in angles for value in (x + radius * math.cos(angle), y + radius * math.sin(angle))]
            )
        elif kind == "polygon":
            values["polygons"].append([value for point in points for value in point])
        else:
            if kind in _WITHOUT_AREA:
                tally.add("shapes that have no area (points, lines) are left out", where)
            else:
                what = "shapes that are no polygon, rectangle, circle or mask are left out"
                tally.add(what, f"{escaped(str(kind))}, {where}", "draw them as polygons")
            if not values["polygons"]:
                found.pop(key)
    return found


def _mask(text: Any, points: Sequence[tuple[float, float]], size: tuple[int, int]) -> dict[str, Any] | None:
    """The run lengths of a mask that lies in a box of the image."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            part = np.asarray(picture.convert("1"))
        left, top = round(points[0][0]), round(points[0][1])
    except (TypeError, ValueError, binascii.Error, OSError, IndexError):
        return None
    whole = np.zeros(size, dtype=np.bool_)
    height, width = min(part.shape[0], size[0] - top), min(part.shape[1], size[1] - left)
    if min(height, width, top + 1, left + 1) < 1 or len(points) < 2:
        return None
    whole[top : top + height, left : left + width] = part[:height, :width]
    return {"size": list(size), "counts": encode_rle(whole)}
