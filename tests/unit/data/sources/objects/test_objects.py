"""Sets with objects as people have them: what is read, what is counted and left out, and what is refused."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.data.account import account
from mixmae.data.annotated import category_ids, object_classes, read_annotated, with_objects
from mixmae.data.blocks import BrokenRecord
from mixmae.data.rle import decode_rle, encode_rle
from mixmae.data.shards.pack import is_image_folder, make_shards
from mixmae.data.source import DataError
from mixmae.data.sources import list_splits, open_source
from mixmae.data.truth import read_truths

pytest.importorskip("pycocotools")
HEIGHT, WIDTH = 40, 60
TRIANGLE = [10.0, 5.0, 30.0, 5.0, 10.0, 25.0]


def picture(path: Path, seed: int = 0, size=(HEIGHT, WIDTH), orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, "JPEG", exif=exif)


def coco(folder: Path, images, annotations, *, name="instances_train2017.json", split="train2017", categories=None):
    """images: names; annotations: dicts without the usual fields."""
    listed = [{"id": 10 + i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in enumerate(images)]
    for index, item in enumerate(listed):
        picture(folder / split / item["file_name"], index)
    usual = {"iscrowd": 0, "category_id": 3, "image_id": 10}
    found = [{"id": 100 + index, **usual, **item} for index, item in enumerate(annotations)]
    kinds = categories or [{"id": 90, "name": "kite"}, {"id": 3, "name": "cup"}]
    content = {"images": listed, "annotations": found, "categories": kinds}
    write_coco(folder, content, name)
    return content


def write_coco(folder: Path, content, name="instances_train2017.json"):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "annotations" / name).write_text(json.dumps(content))


def objects_in(location, split="train"):
    source = with_objects(open_source(str(location), split))
    return source, [truth.objects for truth in read_truths(source, np.arange(source.num_rows))]


def notes_of(source):
    return {note.what: note.count for note in account({"train": source}).notes}


class TestCoco:
    def test_boxes_masks_and_numbers(self, tmp_path):
        rle = np.zeros((HEIGHT, WIDTH), dtype=bool)
        rle[2:6, 3:9] = True
        runs = {"size": [HEIGHT, WIDTH], "counts": encode_rle(rle).decode()}
        coco(
            tmp_path,
            ["a.jpg", "b.jpg"],
            [
                {"bbox": [10, 5, 20, 20], "segmentation": [TRIANGLE], "area": 200},
                {"image_id": 11, "category_id": 90, "bbox": [3, 2, 6, 4], "segmentation": runs},
                {"image_id": 11, "bbox": [0, 0, 60, 40], "iscrowd": 1,
                 "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}},
                {"image_id": 11, "bbox": [1.5, 2.5, 10, 20]},
            ],
        )  # fmt: skip
        source, (first, second) = objects_in(tmp_path)
        assert object_classes(source).objects == ("cup", "kite")
        assert category_ids(object_classes(source)) == (3, 90)
        assert [truth.image_id for truth in read_truths(source, [0, 1])] == [10, 11]
        assert first.boxes.tolist() == [[10, 5, 30, 25]]
        mask = decode_rle(first.masks[0], (HEIGHT, WIDTH))
        assert mask[7, 12]
        assert not mask[22, 27]
        assert abs(mask.sum() - 200) < 25
        assert first.areas.tolist() == [200]
        assert second.labels.tolist() == [1, 0, 0]
        assert second.crowd.tolist() == [False, True, False]
        assert (decode_rle(second.masks[0], (HEIGHT, WIDTH)) == rle).all()
        assert decode_rle(second.masks[1], (HEIGHT, WIDTH)).all()
        assert second.masks[2] == b""
        assert second.areas.tolist() == [24, 2400, 200]
        assert second.ids.tolist() == [101, 102, 103]

    def test_splits(self, tmp_path):
        coco(tmp_path, ["a.jpg"], [{"bbox": [1, 1, 9, 9]}])
        coco(tmp_path, ["a.jpg"], [{"bbox": [1, 1, 5, 5]}], name="instances_val2017.json", split="val2017")
        (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
        assert list_splits(str(tmp_path)) == ("train", "validation")
        assert objects_in(tmp_path)[1][0].boxes.tolist() == [[1, 1, 10, 10]]
        assert objects_in(tmp_path, "validation")[1][0].boxes.tolist() == [[1, 1, 6, 6]]

    def test_a_file_with_mistakes(self, tmp_path):
        """Each is counted under a name of its own, and the rest is read."""
        content = coco(
            tmp_path,
            ["a.jpg", "b.jpg", "a.jpg"],
            [
                {"bbox": [10, 5, 20, 20]},
                {"bbox": [5, 5, 20, 20], "segmentation": [[1, 2, 3, 4]]},
                {"bbox": [5, 5, 20, 20], "segmentation": [[1, 2, 3, 4], TRIANGLE]},
                {"bbox": [70, 5, 20, 20]},
                {"bbox": [5, 5, 0, 20]},
                {"bbox": [50, 30, 25, 25]},
                {"image_id": 999, "bbox": [5, 5, 9, 9]},
                {"category_id": 7, "bbox": [5, 5, 9, 9]},
                {"bbox": [5, 5, 9]},
                {"bbox": [5, "x", 9, 9]},
                {"bbox": [30, 30, -10, -10]},
                {"bbox": [5, 5, 9, 9], "segmentation": {"size": [7, 7], "counts": "1"}},
                {"image_id": 12, "bbox": [1, 1, 8, 8]},
                *({"bbox": [index, 1, 2, 2]} for index in range(20)),
            ],
        )
        content["images"].append({"id": 77, "file_name": "gone.jpg", "height": 5, "width": 5})
        write_coco(tmp_path, content)
        source, (first, second) = objects_in(tmp_path)
        notes = notes_of(source)
        assert notes == {
            "polygons of fewer than three points are left out": 2,
            "objects without a polygon of three points are left out": 1,
            "boxes that are empty or outside of their image are left out": 2,
            "boxes reach beyond their image and are cut": 1,
            "annotations of images that are not listed are left out": 1,
            "annotations of categories that are not listed are left out": 1,
            "boxes of other than four numbers are left out": 1,
            "annotations without an image, a category or numbers for a box are left out": 1,
            "boxes have their corners swapped and are turned round": 1,
            "run-length masks of another size than their image are left out": 1,
            "images are listed twice, and their objects are put together": 1,
            "images of the annotations are not there and are left out": 1,
        }
        boxes = first.boxes.tolist()
        assert [50, 30, 60, 40] in boxes
        assert [20, 20, 30, 30] in boxes
        assert [1, 1, 9, 9] in boxes  # of the second entry of the same image
        assert len(second.boxes) == 0

    def test_corners_where_sizes_are_said(self, tmp_path):
        corners = [{"bbox": [30 + index, 20, 50 + index, 35]} for index in range(8)]
        coco(tmp_path, ["a.jpg"], corners)
        source, (first,) = objects_in(tmp_path)
        assert first.boxes[0].tolist() == [30, 20, 50, 35]
        assert notes_of(source) == {
            "boxes are corners (x0 y0 x1 y1) where COCO has x y width height, and are read as corners": 8
        }

    def test_boxes_of_no_convention(self, tmp_path):
        coco(tmp_path, ["a.jpg"], [{"bbox": [50, 30, 90, 90]}, {"bbox": [50, 30, 20, 90]}])
        with pytest.raises(DataError, match="write them as COCO does"):
            open_source(str(tmp_path))

    def test_what_is_refused(self, tmp_path):
        content = coco(tmp_path, ["a.jpg", "b.jpg"], [{"bbox": [1, 1, 9, 9]}])
        for change, words in (
            ({"categories": []}, "has no categories"),
            ({"images": []}, "names no image"),
            ({"images": [{"id": 1, "file_name": "x.jpg", "height": 5, "width": 5}]}, "none of the 1 train images"),
            (
                {"images": [{**content["images"][0], "file_name": name} for name in ("a.jpg", "b.jpg")]},
                "gives the number 10",
            ),
            ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "no id, file_name, height or width"),
        ):
            write_coco(tmp_path, {**content, **change})
            with pytest.raises(DataError, match=words):
                open_source(str(tmp_path))
        (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(content)[:-9])
        with pytest.raises(DataError, match="is not whole JSON"):
            open_source(str(tmp_path))

    def test_a_photo_that_lies_on_its_side(self, tmp_path):
        """Boxes for the pixels as they are stored are turned with them; for the upright image they are left."""
        coco(tmp_path, ["a.jpg"], [{"bbox": [10, 5, 20, 20], "segmentation": [TRIANGLE]}])
        picture(tmp_path / "train2017/a.jpg", orientation=6)  # turned clockwise: 60 high, 40 wide
        source, (first,) = objects_in(tmp_path)
        assert first.boxes.tolist() == [[HEIGHT - 25, 10, HEIGHT - 5, 30]]
        (item,) = next(read_annotated(source, np.arange(1), channels=3, batch_size=1))
        assert item.pixels.shape[:2] == (WIDTH, HEIGHT)
        mask = decode_rle(first.masks[0], (WIDTH, HEIGHT))
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(np.array(corners) - first.boxes[0]).max() <= 1

    def test_an_image_of_another_size_is_broken(self, tmp_path):
        coco(tmp_path, ["a.jpg", "b.jpg"], [{"bbox": [10, 5, 20, 20]}])
        picture(tmp_path / "train2017/a.jpg", size=(30, 30))
        source = with_objects(open_source(str(tmp_path)))
        first, second = next(read_annotated(source, np.arange(2), channels=3, batch_size=2))
        assert isinstance(first, BrokenRecord)
        assert first.reason == "its objects are for an image of 40 x 60 pixels, and it has 30 x 30"
        assert not isinstance(second, BrokenRecord)

    def test_shards_keep_it_all(self, tmp_path):
        coco(tmp_path / "set", [f"{n}.jpg" for n in range(12)], [
            {"image_id": 10 + n, "bbox": [10, 5, 20, 20], "segmentation": [TRIANGLE]} for n in range(12)
        ])  # fmt: skip
        assert is_image_folder(tmp_path / "set")
        packed = make_shards(tmp_path / "set", tmp_path / "shards", resize_longer_side=30)
        source, objects = objects_in(packed.folder)
        assert category_ids(object_classes(source)) == (3, 90)
        assert objects[0].boxes.tolist() == [[5, 2.5, 15, 12.5]]  # half the size
        assert decode_rle(objects[0].masks[0], (20, 30)).sum() == pytest.approx(50, abs=12)
        items = [
            item
            for batch in read_annotated(source, np.arange(source.num_rows), channels=3, batch_size=4)
            for item in batch
        ]
        assert not [item for item in items if isinstance(item, BrokenRecord)]
        numbers = {truth.image_id for truth in read_truths(source, np.arange(source.num_rows))}
        assert numbers < set(range(10, 22))


def voc(folder: Path, stem: str, *objects: str, lists=()):
    picture(folder / f"JPEGImages/{stem}.jpg")
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"Annotations/{stem}.xml").write_text(
        f"<annotation><size><width>{WIDTH}</width><height>{HEIGHT}</height></size>{''.join(objects)}</annotation>"
    )
    for name in lists:
        path = folder / f"ImageSets/Main/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + f"{stem}\n")


def voc_object(name, x0, y0, x1, y1, difficult=0):
    box = f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


class TestVoc:
    def test_boxes_are_counted_from_one(self, tmp_path):
        voc(tmp_path, "a", voc_object("dog", 1, 1, 60, 40), voc_object("cat", 11, 6, 30, 25, 1), lists=["train"])
        voc(tmp_path, "b", lists=["val"])
        voc(tmp_path, "c")
        source, (objects,) = objects_in(tmp_path)
        assert object_classes(source).objects == ("cat", "dog")
        assert objects.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 30, 25]]
        assert objects.labels.tolist() == [1, 0]
        assert objects.crowd.tolist() == [False, True]
        assert objects_in(tmp_path, "validation")[1][0].boxes.shape == (0, 4)
        assert notes_of(source) == {
            "objects marked as difficult are neither learnt from nor judged": 1,
            "images are in no list of ImageSets and are left out": 1,
        }

    def test_mistakes(self, tmp_path):
        voc(tmp_path, "a", voc_object("dog", 1, 1, 9, 9), voc_object("dog", "x", 1, 9, 9), voc_object("", 1, 1, 9, 9))
        (tmp_path / "Annotations/gone.xml").write_text((tmp_path / "Annotations/a.xml").read_text())
        assert notes_of(objects_in(tmp_path)[0]) == {
            "objects without four numbers for their box are left out": 1,
            "objects without a name are left out": 1,
            "annotations of images that are not there are left out": 1,
        }
        (tmp_path / "Annotations/a.xml").write_text("")
        with pytest.raises(DataError, match=r"is not an annotation of Pascal VOC .* or delete it to leave its image"):
            open_source(str(tmp_path))

    @pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
    def test_without_sizes_boxes_are_of_the_upright_image(self, tmp_path, size):
        voc(tmp_path, "a", voc_object("dog", 11, 6, 30, 25))
        path = tmp_path / "Annotations/a.xml"
        path.write_text(path.read_text().replace(f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>", size))
        source, (objects,) = objects_in(tmp_path)
        assert objects.boxes.tolist() == [[10, 5, 30, 25]]
        assert [what for what in notes_of(source) if "do not say the size" in what]

    def test_xml_files_beside_their_images(self, tmp_path):
        for split in ("train", "val"):
            voc(tmp_path / split, "a ü", voc_object("dog", 11, 6, 30, 25))
            for path in (tmp_path / split / "JPEGImages/a ü.jpg", tmp_path / split / "Annotations/a ü.xml"):
                path.rename(tmp_path / split / path.name)
                path.parent.rmdir()
        picture(tmp_path / "train/bare.jpg")
        source, (objects,) = objects_in(tmp_path)
        assert objects.boxes.tolist() == [[10, 5, 30, 25]]
        assert list_splits(str(tmp_path)) == ("train", "validation")
        assert notes_of(source) == {"images have no XML file and are left out": 1}
        for name in "cde":
            picture(tmp_path / f"train/{name}.jpg")
        assert open_source(str(tmp_path)).num_rows == 5, "few such files do not make a set of objects of photos"

    def test_a_split_without_annotations_is_named(self, tmp_path):
        voc(tmp_path, "a", voc_object("dog", 1, 1, 9, 9), lists=["train"])
        voc(tmp_path, "b", lists=["val"])
        (tmp_path / "Annotations/b.xml").unlink()
        assert notes_of(objects_in(tmp_path)[0]) == {
            "images have no XML file and are left out": 1,
            "lists of ImageSets name no image that is annotated": 1,
        }

    def test_the_folder_of_annotations_means_objects_where_there_are_masks_too(self, tmp_path):
        voc(tmp_path, "a", voc_object("dog", 1, 1, 9, 9))
        for folder in ("SegmentationClass", "SegmentationObject"):
            (tmp_path / folder).mkdir()
            Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / folder / "a.png")
        assert open_source(str(tmp_path)).dense.objects is None
        source = objects_in(tmp_path / "Annotations")[0]
        assert source.dense.objects == ("dog",)
        assert source.read(0, [0])[0].path == "JPEGImages/a.jpg", "a mask is no photo"

    def test_the_folder_of_masks_of_objects_means_these_masks(self, tmp_path):
        dog, cat = voc_object("dog", 1, 1, 10, 10), voc_object("cat", 21, 11, 40, 30)
        voc(tmp_path, "a", dog, cat, voc_object("cat", 50, 30, 55, 35))
        voc(tmp_path, "swapped", cat, dog)
        voc(tmp_path, "bare", dog)
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        values[:10, :10], values[10:30, 20:40], values[10:30, 20] = 1, 2, 255
        for folder in ("SegmentationClass", "SegmentationObject"):
            (tmp_path / folder).mkdir()
            for stem in ("a", "swapped"):
                Image.fromarray(values).save(tmp_path / folder / f"{stem}.png")
        source, (objects, swapped) = objects_in(tmp_path / "SegmentationObject")
        assert objects.boxes.tolist() == [[0, 0, 10, 10], [20, 10, 40, 30]]
        masks = [decode_rle(counts, (HEIGHT, WIDTH)) for counts in objects.masks]
        assert [mask.sum() for mask in masks] == objects.areas.tolist() == [100, 380]
        assert np.array_equal(masks[1], values == 2)
        assert len(swapped.labels) == 0
        assert notes_of(source) == {
            "images have no mask in SegmentationObject and are left out": 1,
            "objects without a pixel in SegmentationObject are left out": 1,
            "objects whose pixels in SegmentationObject are not those of their box are left out": 2,
        }

    def test_names_with_spaces_and_images_that_are_missing(self, tmp_path):
        dog = voc_object("dog", 1, 1, 9, 9)
        voc(tmp_path, "Häuser am See", dog, dog, lists=["train"])
        voc(tmp_path, "b", dog, lists=["val"])
        picture(tmp_path / "JPEGImages/bare.jpg")
        path = tmp_path / "ImageSets/Main/train.txt"
        path.write_bytes((path.read_text() + "gone\nbare\nb\n\n").replace("\n", "\r\n").encode())
        source, objects = objects_in(tmp_path)
        assert [len(item.boxes) for item in objects] == [1, 1]
        assert objects_in(tmp_path, "validation")[0].num_rows == 1
        assert notes_of(source) == {
            "objects that repeat another one are left out": 1,
            "images that the lists of ImageSets name are not there": 1,
            "images have no XML file and are left out": 1,
            "images are in the lists of two splits, so that what is learnt from is judged, too": 1,
        }

    @pytest.mark.parametrize("trainval", [True, False])
    def test_images_of_a_test_list_are_not_trained_on(self, tmp_path, trainval):
        for stem in "abc":
            voc(tmp_path, stem, voc_object("dog", 1, 1, 9, 9), lists=["test"] if stem == "c" else ["trainval"])
        if not trainval:
            (tmp_path / "ImageSets/Main/trainval.txt").unlink()
        assert list_splits(str(tmp_path)) == ("train", "test")
        assert objects_in(tmp_path)[0].num_rows == 2


def yolo(folder: Path, lines: str, *, stem="a", names="names: [car, bus]\n", split="train", places=""):
    picture(folder / f"images/{split}/{stem}.jpg")
    (folder / f"labels/{split}").mkdir(parents=True, exist_ok=True)
    (folder / f"labels/{split}/{stem}.txt").write_text(lines)
    (folder / "data.yaml").write_text(f"{places}{names}")


class TestYolo:
    def test_boxes_and_polygons(self, tmp_path):
        yolo(tmp_path, "1 0.5 0.5 0.5 0.25\n0 0.25 0.25 0.75 0.25 0.25 0.75\n")
        yolo(tmp_path, "", stem="b", split="val", names="names: {0: car, 1: bus}\n")
        source, (objects,) = objects_in(tmp_path)
        assert object_classes(source).objects == ("car", "bus")
        assert category_ids(object_classes(source)) == (0, 1)
        assert objects.boxes.tolist() == [[15, 15, 45, 25], [15, 10, 45, 30]]
        assert objects.masks[0] == b""
        assert decode_rle(objects.masks[1], (HEIGHT, WIDTH)).sum() == pytest.approx(300, abs=40)
        assert len(objects_in(tmp_path, "validation")[1][0].boxes) == 0

    def test_mistakes(self, tmp_path):
        yolo(
            tmp_path, "0 0.5 0.5 0.2 0.2\n0 .50 0.5 0.2 0.2 \n2 0.5 0.5 0.1 0.1\n0 0.5\nx 1 2 3 4\n0 1.5 0.5 0.1 0.1\n"
        )
        picture(tmp_path / "images/train/bare.jpg")
        (tmp_path / "labels/train/gone.txt").write_text("")
        source, objects = objects_in(tmp_path)
        assert [len(item.boxes) for item in objects] == [1, 0]
        assert notes_of(source) == {
            "lines that repeat another one are left out": 1,
            "objects of a class beyond the 2 that have names are left out": 1,
            "lines that are neither a class and a box nor a class and a polygon are left out": 1,
            "lines that are no numbers are left out": 1,
            "boxes that are empty or outside of their image are left out": 1,
            "images have no text file, and no objects": 1,
            "annotations of images that are not there are left out": 1,
        }

    def test_scores_poses_and_numbers_that_are_none(self, tmp_path):
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2 0.93\nnan 0.5 0.5 0.2 0.2\ninf 0.5 0.5 0.2 0.2\n0 nan 0.5 0.2 0.2\n")
        source, (objects,) = objects_in(tmp_path)
        assert objects.boxes.round(3).tolist() == [[24, 16, 36, 24]]
        assert objects.masks == (b"",)
        assert notes_of(source) == {
            "boxes are followed by a fifth number, which is not used": 1,
            "objects of a class beyond the 2 that have names are left out": 2,
            "boxes that are no numbers are left out": 1,
        }
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2 0.5 0.5 0.6 0.6\n", names="names: [car]\nkpt_shape: [2, 2]\n")
        assert objects_in(tmp_path)[1][0].masks == (b"",), "points of a pose are no polygon"

    @pytest.mark.parametrize(
        "places",
        [
            "path: ../datasets/mine\ntrain: images/fit\nval: images/hold\n",
            "train: ../images/fit\nval: C:\\mine\\images\\hold\n",
            "path: /home/me/mine/images\ntrain: [fit]\nval: [hold]\n",
            "train: fit.txt\nval: lists/hold.txt\n",
        ],
    )
    def test_splits_are_those_of_the_yaml_file(self, tmp_path, places):
        (tmp_path / "lists").mkdir()
        (tmp_path / "fit.txt").write_text("./images/fit/a.jpg\n/home/me/images/fit/b c.jpg\n\n")
        (tmp_path / "lists/hold.txt").write_text("images/hold/d.jpg\n")
        for stem, split in (("a", "fit"), ("b c", "fit"), ("d", "hold"), ("e", "more")):
            yolo(tmp_path, "0 0.5 0.5 0.2 0.2\n", stem=stem, split=split, places=places)
        source = objects_in(tmp_path)[0]
        assert source.num_rows == 2
        assert objects_in(tmp_path, "validation")[0].num_rows == 1
        left = "images are in no folder or list that data.yaml names, and are left out"
        assert notes_of(source) == {left: 1}

    def test_a_yaml_file_that_does_not_fit(self, tmp_path):
        places = "train: images/train\nval: images/train\ntest: images/test\nnc: 3\n"
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2\n", places=places, names="names: {'0': car, '1': bus}\n")
        source = objects_in(tmp_path)[0]
        assert source.dense.objects == ("car", "bus")
        assert list_splits(str(tmp_path)) == ("train",)
        assert notes_of(source) == {
            "nc in data.yaml is not the 2 of its names, which count": 1,
            "images are of two splits in data.yaml, and are used in the first of train, val and test": 1,
            "folders or lists of images that data.yaml names are not there": 1,
        }
        yolo(tmp_path, "", names="names: car\n")
        with pytest.raises(DataError, match="names is one text: write a list"):
            open_source(str(tmp_path))

    def test_pixels_instead_of_shares_are_refused(self, tmp_path):
        yolo(tmp_path, "".join(f"0 {20 + number} 20 10 10\n" for number in range(9)))
        with pytest.raises(DataError, match=r"9 of the 9 boxes .* shares of the sides of an image, from 0 to 1"):
            open_source(str(tmp_path))

    def test_a_split_without_text_files_is_named(self, tmp_path):
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2\n")
        picture(tmp_path / "images/val/b.jpg")
        assert notes_of(objects_in(tmp_path)[0]) == {
            "images have no text file, and no objects": 1,
            "splits have no text file at all, so that none of their images has an object": 1,
        }

    def test_classes_need_names(self, tmp_path):
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2\n", names="")
        with pytest.raises(DataError, match=r"no data\.yaml with the names of the classes"):
            open_source(str(tmp_path))
        yolo(tmp_path, "0 0.5 0.5 0.2 0.2\n", names="names: {1: a, 2: b}\n")
        with pytest.raises(DataError, match="numbered from 0 without gaps"):
            open_source(str(tmp_path))


def labelme(folder: Path, *shapes, stem="a"):
    picture(folder / f"{stem}.jpg")
    content = {"shapes": list(shapes), "imageHeight": HEIGHT, "imageWidth": WIDTH, "imageData": None}
    (folder / f"{stem}.json").write_text(json.dumps(content))


def shape(label, points, kind="polygon", **others):
    return {"label": label, "points": points, "shape_type": kind, **others}


class TestLabelMe:
    def test_shapes(self, tmp_path):
        part = np.zeros((10, 20), dtype=bool)
        part[2:, 3:] = True
        out = io.BytesIO()
        Image.fromarray(part).save(out, "PNG")
        drawn = base64.b64encode(out.getvalue()).decode()
        labelme(
            tmp_path,
            shape("dog", [[10, 5], [30, 5], [10, 25]]),
            shape("cat", [[40, 30], [20, 10]], "rectangle"),
            shape("cat", [[30, 20], [30, 25]], "circle"),
            shape("dog", [[0, 0], [5, 0], [5, 5], [0, 5]], group_id=1),
            shape("dog", [[50, 30], [55, 30], [55, 35], [50, 35]], group_id=1),
            shape("owl", [[4, 6], [23, 15]], "mask", mask=drawn),
        )
        source, (objects,) = objects_in(tmp_path)
        assert object_classes(source).objects == ("cat", "dog", "owl")
        by_label = [objects.boxes[objects.labels == label].tolist() for label in range(3)]
        assert by_label[0] == [[20, 10, 40, 30], pytest.approx([25, 15, 35, 25])]
        assert by_label[1] == [[10, 5, 30, 25], [0, 0, 55, 35]]  # the parts of a group are one object
        assert by_label[2] == [[4, 6, 24, 16]]
        masks = [decode_rle(mask, (HEIGHT, WIDTH)) for mask in objects.masks]
        assert masks[3].sum() == pytest.approx(50, abs=25)
        assert (masks[4][6:16, 4:24] == part).all()
        assert masks[2].sum() == pytest.approx(np.pi * 25, abs=15)

    def test_mistakes(self, tmp_path):
        labelme(
            tmp_path,
            shape("dog", [[10, 5], [30, 5], [10, 25]]),
            shape("dog", [[10, 5], [30, 5]]),
            shape("__ignore__", [[10, 5], [30, 5], [10, 25]]),
            shape("dog", [[10, 5]], "point"),
            shape("dog", [[1, 2], [3, 4]], "mask", mask="no picture"),
            {"label": "dog"},
        )
        picture(tmp_path / "bare.jpg")
        source, (objects,) = objects_in(tmp_path)
        assert len(objects.boxes) == 1
        assert notes_of(source) == {
            "polygons of fewer than three points are left out": 1,
            "objects without a polygon of three points are left out": 1,
            "shapes of labels that are not objects are left out": 1,
            "shapes that have no area (points, lines) are left out": 1,
            "masks that do not decode are left out": 1,
            "shapes without a label or points are left out": 1,
            "images have no JSON file and are left out": 1,
        }

    def test_a_folder_of_annotations(self, tmp_path):
        for stem in ("a", "b ü", "c"):
            labelme(tmp_path, shape("cup", [[1.0, 1.0], [9.0, 1.0], [9.0, 9.0]]), stem=stem)
        for name, image in (("a", "..\\images\\train\\other.jpg"), ("b ü", "C:/gone/b ü.jpg"), ("c", "c.jpg")):
            content = json.loads((tmp_path / f"{name}.json").read_text()) | {"imagePath": image}
            (tmp_path / "json").mkdir(exist_ok=True)
            (tmp_path / f"{name}.json").unlink()
            (tmp_path / f"json/{name}.json").write_text(json.dumps(content))
        for name, target in (("a", "train/other"), ("b ü", "val/b ü"), ("c", "train/bare")):
            (tmp_path / "images" / target).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f"{name}.jpg").rename(tmp_path / f"images/{target}.jpg")
        source, objects = objects_in(tmp_path)
        assert [len(item.boxes) for item in objects] == [1]
        assert source.read(0, [0])[0].path == "images/train/other.jpg"
        assert objects_in(tmp_path, "validation")[0].num_rows == 1
        assert notes_of(source) == {
            "annotations of images that are not there are left out": 1,
            "images have no JSON file and are left out": 1,
        }

    def test_repeated_shapes_and_shapes_of_other_kinds(self, tmp_path):
        corners = [[1.0, 1.0], [9.0, 1.0], [9.0, 9.0]]
        labelme(tmp_path, shape("cup", corners), shape("cup", corners), shape("cup", corners, "rotation"))
        source, (objects,) = objects_in(tmp_path)
        assert len(objects.boxes) == 1
        assert notes_of(source) == {
            "objects that repeat another one are left out": 1,
            "shapes that are no polygon, rectangle, circle or mask are left out": 1,
        }


def test_folders_of_other_kinds_have_no_objects(tmp_path):
    for number in range(4):
        picture(tmp_path / f"class{number % 2}/{number}.jpg", number)
    (tmp_path / "notes.json").write_text('{"shapes": []}')
    (tmp_path / "notes.txt").write_text("0 0.5 0.5 0.5 0.5")
    source = open_source(str(tmp_path))
    assert source.class_names == ("class0", "class1")
    with pytest.raises(DataError, match="has no objects"):
        with_objects(source)
