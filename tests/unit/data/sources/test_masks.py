"""Folders of images with masks: which belong together, what values mean, and what is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.data.shards.pack import is_image_folder, make_shards
from mixmae.data.source import DataError
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.masks import CITYSCAPES, MaskRule
from mixmae.data.truth import IGNORE, decode_map, read_truths, with_maps
from tests.factories import jpeg

SIZE = (8, 12)


def _image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed, *SIZE))


def _mask(path: Path, *values: int, mode: str = "L") -> None:
    """A mask whose columns have these values in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = np.array(values, dtype=np.uint8)[np.arange(SIZE[1]) * len(values) // SIZE[1]]
    image = Image.fromarray(np.broadcast_to(columns, SIZE).copy())
    if mode == "P":
        image = image.copy()
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    elif mode == "I":
        image = Image.fromarray(np.asarray(image).astype(np.uint16))  # a PNG of 16 bits
    elif mode != "L":
        image = image.convert(mode)
    image.save(path)


def _pairs(root: Path, count: int = 10, values: tuple[int, ...] = (0, 1, 255), mode: str = "L") -> Path:
    for number in range(count):
        _image(root / f"images/{number}.jpg", number)
        _mask(root / f"masks/{number}.png", *values, mode=mode)
    return root


def _first_map(location: Path, split: str = "train") -> np.ndarray:
    source = with_maps(open_source(str(location), split))
    (truth,) = read_truths(source, [0])
    return decode_map(truth, SIZE, len(source.dense.pixels))


def test_images_and_masks(tmp_path):
    source = open_source(str(_pairs(tmp_path)))
    assert source.dense.pixels == ("0", "1")
    assert source.num_rows == 10
    assert sorted(np.unique(_first_map(tmp_path))) == [0, 1, IGNORE]
    assert is_image_folder(tmp_path)
    assert not source.has_labels


def test_classes_by_file(tmp_path):
    _pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nthing\nunseen\n")
    assert open_source(str(tmp_path)).dense.pixels == ("ground", "thing", "unseen")
    rule = {"classes": ["thing"], "values": [1], "ignore": [0, 255]}
    (tmp_path / "masks.json").write_text(json.dumps(rule))
    assert open_source(str(tmp_path)).dense.pixels == ("thing",)
    assert sorted(np.unique(_first_map(tmp_path))) == [0, IGNORE]


@pytest.mark.parametrize("mode", ["L", "P", "I", "RGB"])
def test_kinds_of_files(tmp_path, mode):
    """Palettes are indices, whatever their colours; grey saved in three channels is what it was."""
    _pairs(tmp_path, mode=mode)
    assert sorted(np.unique(_first_map(tmp_path))) == [0, 1, IGNORE]


def test_splits_above_and_inside(tmp_path):
    for split, name in (("train", "a"), ("val", "b")):
        for number in range(8):
            _image(tmp_path / f"one/{split}/images/{name}{number}.jpg", number)
            _mask(tmp_path / f"one/{split}/masks/{name}{number}_mask.png", 0, 1)
            _image(tmp_path / f"two/images/{split}/{name}{number}.jpg", number)
            _mask(tmp_path / f"two/annotations/{split}/{name}{number}.png", 0, 1)
    for folder in ("one", "two"):
        assert list_splits(str(tmp_path / folder)) == ("train", "validation")
        assert open_source(str(tmp_path / folder), "validation").num_rows == 8


def test_ade20k(tmp_path):
    for split, short in (("training", "train"), ("validation", "val")):
        for number in range(8):
            _image(tmp_path / f"ADE/images/{split}/ADE_{short}_{number:08d}.jpg", number)
            _mask(tmp_path / f"ADE/annotations/{split}/ADE_{short}_{number:08d}.png", 0, 1, 150)
    info = ["Idx\tRatio\tTrain\tVal\tName", *(f"{n}\t0.1\t1\t1\tname {n}, other" for n in range(1, 151))]
    (tmp_path / "ADE/objectInfo150.txt").write_text("\n".join(info))
    source = open_source(str(tmp_path / "ADE"))
    assert source.dense.pixels[0] == "name 1"
    assert len(source.dense.pixels) == 150
    assert sorted(np.unique(_first_map(tmp_path / "ADE", "validation"))) == [0, 149, IGNORE]


def test_the_full_ade20k_is_another_set(tmp_path):
    _image(tmp_path / "images/training/a/ADE_train_00000001.jpg")
    _mask(tmp_path / "images/training/a/ADE_train_00000001_seg.png", 0, 1, mode="RGB")
    with pytest.raises(DataError, match=r"is of the full ADE20K.*SceneParse150"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    values = (7, 33, 0) if kind == "labelIds" else (0, 18, 255)
    for split in ("train", "val"):
        for number in range(8):
            _image(tmp_path / f"leftImg8bit/{split}/aachen/aachen_{number}_leftImg8bit.png", number)
            _mask(tmp_path / f"gtFine/{split}/aachen/aachen_{number}_gtFine_{kind}.png", *values)
    _image(tmp_path / "leftImg8bit/test/berlin/berlin_0_leftImg8bit.png")
    source = open_source(str(tmp_path))
    assert source.dense.pixels == tuple(CITYSCAPES)
    assert sorted(np.unique(_first_map(tmp_path, "validation"))) == [0, 18, IGNORE]
    assert ["images have no mask and are left out" in str(note) for note in source.met[-1].notes] == [True]


def test_cityscapes_with_test_masks_and_both_kinds(tmp_path):
    for split in ("train", "val", "test"):
        for number in range(4):
            stem = f"{split}/aachen/aachen_{number}"
            _image(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", number)
            _mask(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", *((0, 1, 3) if split == "test" else (7, 33, 0)))
            if split == "train":
                _mask(tmp_path / f"gtFine/{stem}_gtFine_labelTrainIds.png", 0, 18, 255)
    assert sorted(np.unique(_first_map(tmp_path))) == [0, 18, IGNORE]
    assert sorted(np.unique(_first_map(tmp_path, "validation"))) == [0, 18, IGNORE]
    test = open_source(str(tmp_path), "test")  # its truth is not public
    assert test.num_rows == 4
    assert [note.count for met in test.met for note in met.notes if "all ignored" in note.what] == [4]


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for number in range(20):
        _image(root / f"JPEGImages/2007_{number:06d}.jpg", number)
        if number < 18:
            _mask(root / f"SegmentationClass/2007_{number:06d}.png", 0, 20, 255, mode="P")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    _image(root / "JPEGImages/Häuser am See.jpg")
    _mask(root / "SegmentationClass/Häuser am See.png", 0, 20, 255, mode="P")
    listed = [*(f"2007_{number:06d}" for number in range(9)), "Häuser am See", "gone"]
    (lists / "train.txt").write_bytes("\r\n".join(listed).encode())
    (lists / "val.txt").write_text("".join(f"2007_{number:06d}\n" for number in range(9, 16)))
    train, val = (open_source(str(tmp_path), split) for split in ("train", "validation"))
    assert (train.num_rows, val.num_rows) == (10, 7)
    assert train.dense.pixels[20] == "tvmonitor"
    assert sorted(np.unique(_first_map(tmp_path))) == [0, 20, IGNORE]
    notes = {note.what: note.count for note in train.met[-1].notes}
    assert notes == {
        "images that the lists of ImageSets name are not there": 1,
        "images have no mask and are left out": 2,
        "images are in no list of ImageSets and are left out": 2,
    }


def test_classes_of_their_own_in_the_form_of_pascal_voc(tmp_path):
    for number in range(8):
        _image(tmp_path / f"JPEGImages/{number}.jpg", number)
        _mask(tmp_path / f"SegmentationClass/{number}.png", 0, 2, 255, mode="P")
    assert open_source(str(tmp_path)).dense.pixels[2] == "bicycle"
    (tmp_path / "class_names.txt").write_text("_background_\nscrew\nnut\n")
    assert open_source(str(tmp_path)).dense.pixels == ("_background_", "screw", "nut")


def test_missing_masks_are_counted_and_named(tmp_path):
    _pairs(tmp_path)
    _image(tmp_path / "images/alone.jpg")
    _mask(tmp_path / "masks/nobody.png", 0, 1)
    notes = {note.what: (note.count, note.example) for note in open_source(str(tmp_path)).met[-1].notes}
    assert notes == {
        "images have no mask and are left out": (1, "images/alone.jpg"),
        "masks have no image and are left out": (1, "masks/nobody.png"),
    }


def test_masks_saved_as_jpeg(tmp_path):
    for number in range(8):
        _image(tmp_path / f"images/{number}.jpg", number)
        _image(tmp_path / f"masks/{number}.jpg", number)
    with pytest.raises(DataError, match=r"8 masks of .* are JPEGs, such as masks/0.jpg.*save masks as PNG"):
        open_source(str(tmp_path))


def test_masks_with_colours(tmp_path):
    _pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    for path in (tmp_path / "masks").glob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match=r"10 of 10 masks .* has colours \(mode RGB\)"):
        open_source(str(tmp_path))
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"none of the 10 masks .* for example masks/.*png: its mask has colours"):
        open_source(str(tmp_path))


def test_labels_beyond_the_classes(tmp_path):
    _pairs(tmp_path, values=(0, 1, 7))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    with pytest.raises(DataError, match="the value 7, which is no class and is not ignored; 2 classes are expected"):
        open_source(str(tmp_path))


def test_masks_that_are_no_images_are_named_without_an_address_in_memory(tmp_path):
    _pairs(tmp_path, 20)
    (tmp_path / "masks/3.png").write_bytes(b"")
    (tmp_path / "masks/4.png").write_bytes(b"not an image")
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    problems = {truth.problem for truth in _all(tmp_path, "train") if truth.problem}
    assert problems == {"its mask is an empty file (masks/3.png)", "its mask is not an image (masks/4.png)"}


def test_a_single_wrong_mask_is_a_broken_row(tmp_path):
    _pairs(tmp_path / "set", 20)
    (tmp_path / "set/classes.txt").write_text("ground\nthing\n")
    _mask(tmp_path / "set/masks/3.png", 0, 9)
    lines: list[str] = []
    made = make_shards(tmp_path / "set", tmp_path / "out", report=lines.append)
    assert made.num_broken == 1
    assert any("its mask has the value 9" in line and "masks/3.png" in line for line in lines)
    truths = [truth for split in ("train", "validation") for truth in _all(tmp_path / "out", split)]
    assert sum(not truth.segmentation for truth in truths) == 1
    assert len(truths) == 20


def _all(folder: Path, split: str) -> list:
    source = with_maps(open_source(str(folder), split))
    return read_truths(source, range(source.num_rows))


def test_zero_and_255_alone(tmp_path):
    _pairs(tmp_path, values=(0, 255))
    with pytest.raises(DataError, match="values 0 and 255 alone, and 255 usually means pixels to ignore"):
        open_source(str(tmp_path))
    (tmp_path / "masks.json").write_text('{"classes": ["ground", "object"], "values": [0, 255], "ignore": []}')
    assert sorted(np.unique(_first_map(tmp_path))) == [0, 1]


def test_everything_ignored(tmp_path):
    _pairs(tmp_path, values=(255,))
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    with pytest.raises(DataError, match=r"all pixels of the 10 masks .* are ignored"):
        open_source(str(tmp_path))


def test_values_far_apart(tmp_path):
    _pairs(tmp_path, values=(0, 100, 200))
    with pytest.raises(DataError, match=r"have 3 values up to 200 \(0, 100, 200\): say which are classes"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"classes": ["a"], "values": [1, 2]}', '{"classes": ["a"], "values": [255]}', "{}"]
)
def test_a_rule_that_cannot_be_read(tmp_path, text):
    _pairs(tmp_path)
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(DataError, match=r"masks\.json"):
        open_source(str(tmp_path))


def test_another_rule_is_other_data(tmp_path):
    _pairs(tmp_path)
    before = open_source(str(tmp_path)).digest
    (tmp_path / "classes.txt").write_text("ground\nthing\n")
    named = open_source(str(tmp_path)).digest
    _mask(tmp_path / "masks/3.png", 1, 0)
    assert len({before, named, open_source(str(tmp_path)).digest}) == 3


def test_a_table_by_hand():
    table = MaskRule(classes=("a", "b"), values=(5, 3), ignore=(0,)).table
    assert [int(table[value]) for value in (0, 3, 5, 7)] == [IGNORE, 1, 0, -1]
