"""Parquet in Hugging Face's layouts of segmentation and detection: read right, or refused in a sentence."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixmae.data.annotated import object_classes, with_objects
from mixmae.data.images.decode import decode_image, turn
from mixmae.data.rle import decode_rle
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError, Source
from mixmae.data.sources import open_source
from mixmae.data.truth import Truth, decode_map, dense_classes, read_truths, with_maps
from tests.factories import all_samples, jpeg

SIZE = (40, 56)
"""Of the images of tests.factories.jpeg."""


def png(values: np.ndarray, mode: str = "L", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).convert(mode).save(out, kind)
    return out.getvalue()


def stripes(*values: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A map with a stripe of each value."""
    return np.repeat(np.array(values, dtype=np.uint8), -(-size[1] // len(values)))[None, : size[1]].repeat(size[0], 0)


def write(path: Path, images: list[bytes], features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A file of a set, with what `datasets` writes into the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array([{"bytes": data, "path": None} for data in images]), **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)
    return path.parent


def masked(path: Path, *masks: bytes | None, column: str = "label", **columns: Any) -> Path:
    cells = pa.array(
        [None if mask is None else {"bytes": mask, "path": None} for mask in masks],
        type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    return write(path, [jpeg(row, *SIZE) for row in range(len(masks))], **{column: cells}, **columns)


def truths(source: Source) -> list[Truth]:
    return read_truths(source, np.arange(source.num_rows))  # type: ignore[arg-type]


def maps(source: Source) -> list[np.ndarray]:
    count = len(with_maps(source).dense.pixels)  # type: ignore[union-attr,arg-type]
    return [decode_map(truth, SIZE, count) for truth in truths(source)]


@pytest.mark.parametrize("column", ["label", "annotation", "mask", "segmentation_map"])
def test_masks_whose_values_are_classes(tmp_path, column):
    values = [stripes(0, 1, 255), stripes(2, 0), stripes(1)]
    opened = open_source(masked(tmp_path / "train.parquet", *map(png, values), column=column))
    source = pickle.loads(pickle.dumps(opened))
    assert source.dense.pixels == ("0", "1", "2")
    for found, expected in zip(maps(source), values, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not source.has_labels
    assert not any(met.notes for met in source.met)  # a column of masks is no column of labels that cannot be read


def test_scene_parse_150_has_zero_for_ignored(tmp_path):
    scenes = pa.array([3, 4])
    folder = masked(
        tmp_path / "train.parquet",
        png(stripes(0, 1, 150)),
        png(stripes(7)),
        column="annotation",
        scene_category=scenes,
    )
    source = open_source(folder)
    assert len(source.dense.pixels) == 150
    np.testing.assert_array_equal(maps(source)[0], stripes(255, 0, 149))


def test_files_say_what_values_mean(tmp_path):
    folder = masked(tmp_path / "train.parquet", png(stripes(0, 1, 255)), png(stripes(1)))
    by_values = open_source(folder).digest
    (folder / "id2label.json").write_text(json.dumps({"0": "road", "1": "car", "2": "sky"}))
    source = open_source(folder)
    by_names = source.digest
    assert source.dense.pixels == ("road", "car", "sky")
    np.testing.assert_array_equal(maps(source)[0], stripes(0, 1, 255))
    (folder / "masks.json").write_text(json.dumps({"classes": ["car"], "values": [1], "ignore": [0, 255]}))
    ruled = open_source(folder)
    np.testing.assert_array_equal(maps(ruled)[0], stripes(255, 0, 255))
    assert len({by_values, by_names, ruled.digest}) == 3
    (folder / "masks.json").unlink()
    (folder / "id2label.json").write_text("[]")
    with pytest.raises(DataError, match=r"id2label.json is not"):
        with_maps(open_source(folder))


def test_the_values_of_all_splits_tell_the_classes(tmp_path):
    masked(tmp_path / "train-0.parquet", png(stripes(0, 1)), png(stripes(1)))
    masked(tmp_path / "validation-0.parquet", png(stripes(0, 2)))
    sets = [open_source(tmp_path, split) for split in ("train", "validation")]
    assert [source.dense.pixels for source in sets] == [("0", "1", "2")] * 2


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (png(stripes(0, 255)), "0 and 255 alone"),
        (png(stripes(0, 1), kind="JPEG"), "its mask is a JPEG"),
        (png(np.dstack([stripes(0, 90), stripes(30, 1), stripes(5)]), "RGB"), "its mask has colours"),
        (png(stripes(3, 200)), "say which are classes in masks.json"),
    ],
)
def test_masks_that_are_not_clear(tmp_path, mask, words):
    """The images can be used all the same: only a dense task asks for the masks."""
    folder = masked(tmp_path / "train.parquet", *[mask] * 3)
    if "JPEG" in words or "colours" in words:
        (folder / "classes.txt").write_text("ground\nroad\n")
    source = open_source(folder)
    assert len(all_samples(source)) == 3
    assert source.digest
    with pytest.raises(DataError, match=words):
        with_maps(source)


def test_two_columns_of_masks(tmp_path):
    cell = pa.array([{"bytes": png(stripes(0, 1)), "path": None}])
    source = open_source(masked(tmp_path / "train.parquet", png(stripes(0, 1)), column="label", mask=cell))
    with pytest.raises(DataError, match="several columns of masks, label and mask"):
        with_maps(source)


def test_a_mask_that_is_not_there_or_of_another_size_is_a_broken_row(tmp_path):
    source = open_source(
        masked(tmp_path / "train.parquet", png(stripes(0, 1)), None, png(stripes(1, size=(8, 8))), png(stripes(0)))
    )
    problems = [truth.problem for truth in truths(source) if not truth.segmentation]
    assert problems == ["it has no mask in the file", "its mask is of 8 x 8 pixels and the image of 40 x 56"]
    masked(tmp_path / "test-0.parquet", None, None)  # masks of a test set are often not public
    assert open_source(tmp_path, "test").dense == source.dense


def test_a_mask_on_the_stored_pixels_is_turned_with_its_photo(tmp_path):
    pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
    pixels[:, :14] = 255
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(out, "JPEG", exif=exif, quality=95)
    values = (pixels[..., 0] > 128).astype(np.uint8)
    cells = pa.array([{"bytes": png(values), "path": None}])
    source = open_source(write(tmp_path / "train.parquet", [out.getvalue()], label=cells))
    (truth,) = truths(source)
    upright = decode_image(out.getvalue(), 3)
    found = decode_map(truth, upright.shape[:2], 2)
    np.testing.assert_array_equal(found, turn(values[..., None], 6)[..., 0])
    assert ((upright[..., 0] > 128) == found).mean() > 0.97


def test_packed_masks_are_the_same(tmp_path):
    values = [stripes(0, 1, 255) if row % 2 else stripes(1, 2) for row in range(40)]
    folder = masked(tmp_path / "set" / "train.parquet", *map(png, values))
    make_shards(folder, tmp_path / "shards", report=lambda _: None)
    packed = open_source(tmp_path / "shards")
    assert packed.dense.pixels == ("0", "1", "2")
    pairs = zip(all_samples(open_source(folder)), values, strict=True)
    expected = {decode_image(sample.data, 3).tobytes(): own for sample, own in pairs}
    assert packed.num_rows > 30
    for sample, found in zip(all_samples(packed), maps(packed), strict=True):
        np.testing.assert_array_equal(found, expected[decode_image(sample.data, 3).tobytes()])


BOXES = [[[2.0, 3.0, 10.0, 20.0], [0.0, 0.0, 56.0, 40.0]], [], [[30.0, 10.0, 8.0, 8.0]]]
"""x y width height of the objects of three images."""
CLASSES = [[1, 0], [], [2]]
NAMES = ["cat", "dog", "bird"]
NUMBER = {"dtype": "float32", "_type": "Value"}
FEATURES = {
    "old": {
        "feature": {
            "bbox": {"feature": NUMBER, "_type": "Sequence"},
            "category": {"names": NAMES, "_type": "ClassLabel"},
        },
        "_type": "Sequence",
    },
    "new": {
        "bbox": {"feature": {"feature": NUMBER, "_type": "List"}, "_type": "List"},
        "category": {"feature": {"names": NAMES, "_type": "ClassLabel"}, "_type": "List"},
    },
    "list": [{"bbox": {"feature": NUMBER, "_type": "List"}, "category": {"names": dict(enumerate(NAMES))}}],
}


def as_lists(boxes: list[list[list[float]]], classes: list[list[Any]], key: str = "category", **more: Any) -> pa.Array:
    """Objects as a struct of lists."""
    rows = zip(boxes, classes, strict=True)
    return pa.array(
        [
            {"bbox": box, key: label, **{name: values[row] for name, values in more.items()}}
            for row, (box, label) in enumerate(rows)
        ]
    )


def as_structs(
    boxes: list[list[list[float]]], classes: list[list[Any]], key: str = "category", **more: Any
) -> pa.Array:
    """Objects as a list of structs."""
    return pa.array(
        [
            [
                {"bbox": one, key: name, **{field: values[row][place] for field, values in more.items()}}
                for place, (one, name) in enumerate(zip(box, label, strict=True))
            ]
            for row, (box, label) in enumerate(zip(boxes, classes, strict=True))
        ]
    )


def detected(path: Path, objects: pa.Array, features: Any = None, *, sized: bool = True, **columns: Any) -> Path:
    if sized:
        columns |= {"height": pa.array([SIZE[0]] * len(objects)), "width": pa.array([SIZE[1]] * len(objects))}
    images = [jpeg(row, *SIZE) for row in range(len(objects))]
    return write(path, images, None if features is None else {"objects": features}, objects=objects, **columns)


def notes(source: Source) -> dict[str, int]:
    return {note.what: note.count for met in source.met for note in met.notes}


@pytest.mark.parametrize("make", [as_lists, as_structs])
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("sized", [True, False])
def test_objects_in_either_form(tmp_path, make, features, sized):
    more = {"id": [[7, 9], [], [4]], "area": [[100.0, 5.0], [], [64.0]], "iscrowd": [[0, 1], [], [0]]}
    objects = make(BOXES, CLASSES, **more)
    ids = pa.array([11, 5, 8])
    folder = detected(tmp_path / "train.parquet", objects, FEATURES[features], sized=sized, image_id=ids)
    source = pickle.loads(pickle.dumps(open_source(folder)))
    assert object_classes(source).objects == tuple(NAMES)
    assert object_classes(source).object_ids == (0, 1, 2)
    first, empty, last = truths(source)
    np.testing.assert_array_equal(first.objects.boxes, [[2, 3, 12, 23], [0, 0, 56, 40]])
    assert first.objects.labels.tolist() == [1, 0]
    assert first.objects.ids.tolist() == [7, 9]
    assert first.objects.areas.tolist() == [100, 5]
    assert first.objects.crowd.tolist() == [False, True]
    assert first.size == SIZE
    assert [truth.image_id for truth in (first, empty, last)] == [11, 5, 8]
    assert len(empty.objects.labels) == 0
    assert last.objects.labels.tolist() == [2]
    assert not notes(source)


@pytest.mark.parametrize("sized", [True, False])
def test_boxes_that_are_corners_are_told_by_where_they_would_end(tmp_path, sized):
    boxes = [[[20.0, 10.0, 50.0, 35.0]]] * 12
    source = open_source(detected(tmp_path / "train.parquet", as_lists(boxes, [[0]] * 12), sized=sized))
    with_objects(source)
    np.testing.assert_array_equal(truths(source)[3].objects.boxes, boxes[3])
    assert notes(source) == {
        "boxes are corners (x0 y0 x1 y1) where Hugging Face's are x y width height, and are read as corners": 12
    }


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([40.0, 30.0, 30.0, 20.0], "make no sense as x0 y0 x1 y1"),
        ([0.2, 0.3, 0.4, 0.5], "they are shares of their images"),
    ],
)
def test_boxes_that_make_no_sense(tmp_path, box, words):
    source = open_source(detected(tmp_path / "train.parquet", as_lists([[box]] * 12, [[0]] * 12)))
    assert len(all_samples(source)) == 12
    with pytest.raises(DataError, match=words):
        with_objects(source)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    boxes = [[[2.0, 3.0, 10.0, 20.0], [2.0, 3.0, 0.0, 5.0]], [[100.0, 3.0, 10.0, 5.0]], [[50.0, 30.0, 10.0, 5.0]]]
    boxes += [[[2.0, 3.0, 10.0]]] + [[[1.0, 1.0, 5.0, 5.0]]] * 20
    classes = [[0, 1], [0], [1], [0], [7], *[[1]] * 19]
    source = open_source(detected(tmp_path / "train.parquet", as_structs(boxes, classes), FEATURES["list"]))
    assert not notes(source)  # nobody has asked yet
    with_objects(source)
    assert notes(source) == {
        "boxes that are empty or outside of their image are left out": 2,
        "boxes reach beyond their image and are cut": 1,
        "boxes of other than four numbers are left out": 1,
        "objects without a known class are left out": 1,
    }
    found = truths(source)
    assert [len(truth.objects.labels) for truth in found[:6]] == [1, 0, 1, 0, 0, 1]
    np.testing.assert_array_equal(found[2].objects.boxes, [[50, 30, 56, 35]])
    make_shards(tmp_path, tmp_path / "shards", report=lambda _: None)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert "boxes reach beyond their image and are cut" in json.dumps(manifest["met"])


def test_rows_that_cannot_be_read_are_broken(tmp_path):
    objects = pa.array(
        [
            {"bbox": [[1.0, 1.0, 5.0, 5.0]], "category": [0, 1]},
            None,
            *[{"bbox": [[1.0, 1.0, 5.0, 5.0]], "category": [0]}] * 10,
            {"bbox": [[90.0, 1.0, 5.0, 5.0]], "category": [1]},
        ]
    )
    source = open_source(detected(tmp_path / "train.parquet", objects, FEATURES["old"], sized=False))
    problems = [truth.problem for truth in truths(source) if truth.objects is None]
    assert problems == [
        "the lists of its objects have other lengths (1 of bbox, 2 of category)",
        "nothing is known about its objects",
        "1 of its 1 boxes lie outside of the image",
    ]
    assert notes(source) == {"images have objects that cannot be read and are not used": 2}


def test_classes_without_names(tmp_path):
    detected(tmp_path / "a" / "train.parquet", as_lists(BOXES, [[18, 1], [], [90]], "category_id"))
    detected(tmp_path / "a" / "validation.parquet", as_lists(BOXES[:1], [[44, 1]], "category_id"))
    for split in ("train", "validation"):
        known = object_classes(open_source(tmp_path / "a", split))
        assert (known.objects, known.object_ids) == (("1", "18", "44", "90"), (1, 18, 44, 90))
    detected(tmp_path / "b" / "train.parquet", as_lists(BOXES, [["dog", " cat"], [], ["bird"]]))
    source = open_source(tmp_path / "b")
    assert object_classes(source).objects == ("bird", "cat", "dog")
    assert truths(source)[0].objects.labels.tolist() == [2, 1]
    detected(tmp_path / "c" / "train.parquet", as_lists(BOXES, [[None, None], [], [None]]))
    with pytest.raises(DataError, match="has no object with a class in objects"):
        with_objects(open_source(tmp_path / "c"))


def test_polygons_become_masks(tmp_path):
    pytest.importorskip("pycocotools")
    square = [2.0, 3.0, 12.0, 3.0, 12.0, 23.0, 2.0, 23.0]
    whole = [0.0, 0.0, 56.0, 0.0, 56.0, 40.0, 0.0, 40.0]
    corner = [30.0, 10.0, 38.0, 10.0, 38.0, 18.0]
    objects = as_structs(BOXES, CLASSES, segmentation=[[[square], [whole]], [], [[corner]]])
    source = open_source(detected(tmp_path / "train.parquet", objects, FEATURES["list"]))
    found = truths(source)
    masks = [decode_rle(mask, SIZE) for mask in found[0].objects.masks]
    assert masks[0].sum() == 200
    assert masks[0][3:23, 2:12].all()
    assert masks[1].all()
    assert 20 < decode_rle(found[2].objects.masks[0], SIZE).sum() < 45


def test_splits_of_other_classes_are_not_packed_as_one(tmp_path):
    folder = detected(tmp_path / "set" / "train.parquet", as_lists(BOXES * 8, CLASSES * 8), FEATURES["new"])
    others = json.loads(json.dumps(FEATURES["new"]).replace("bird", "horse"))
    detected(tmp_path / "set" / "validation.parquet", as_lists(BOXES, CLASSES), others)
    with pytest.raises(DataError, match=r"the validation images of .* have other classes of pixels or objects"):
        make_shards(folder, tmp_path / "shards", report=lambda _: None)


def test_a_column_of_objects_that_is_something_else(tmp_path):
    """Text, or structs without boxes: an ordinary set of images."""
    for name, column in (("a", pa.array(["a cat"] * 3)), ("b", pa.array([{"bbox": "1 2 3 4", "category": 0}] * 3))):
        source = open_source(detected(tmp_path / name / "train.parquet", column, sized=False))
        assert dense_classes(source) is None
        assert [truth.objects for truth in truths(source)] == [None] * 3
