"""iNaturalist and Places as they are handed out: small sets of the same layout, through make_shards and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmae.data.classes import read_classes
from mixmae.data.prepare import open_for_training
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError, read_rows
from mixmae.data.sources import layout_of, list_splits, open_source

Contents = dict[str, tuple[int, str]]
"""Of every image, by its path in the set: its number, from which its pixels come, and the name of its class."""


@pytest.fixture
def write(tmp_path: Path, make_jpeg: Callable[[int], bytes]) -> Callable[..., Path]:
    """Writes files below a folder: an int is a JPEG of this number, a list or dict JSON, a string text."""

    def write(below: str, files: dict[str, Any]) -> Path:
        for name, content in files.items():
            path = tmp_path / below / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, int):
                path.write_bytes(make_jpeg(content))
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / below

    return write


def inaturalist(year: int) -> tuple[dict[str, Any], dict[str, Contents]]:
    """Three categories, listed out of order and with a gap in their ids; images in an order of their own."""
    categories = [(5, "c five", "Aves"), (0, "c zero", "Plantae"), (2, "c two", "Aves")]
    files: dict[str, Any] = {f"test{year}/0a.jpg": 900, f"test{year}.json": {"images": [{"id": 1, "file_name": "x"}]}}
    contents: dict[str, Contents] = {}
    for split, first, count in (("train", 0, 12), ("val", 100, 6)):
        images, annotations = [], []
        contents[split] = {}
        for number in range(first, first + count):
            category, name, family = categories[number % 3]
            path = f"train_val{year}/{family}/{category}/{number:032x}.jpg"
            files[path] = number
            contents[split][path] = (number, name)
            images.append({"id": 7000 - number, "file_name": path, "width": 56, "height": 40})
            annotations.append({"id": number, "image_id": 7000 - number, "category_id": category})
        listed = [{"id": number, "name": name, "supercategory": family} for number, name, family in categories]
        files[f"{split}{year}.json"] = {
            "info": {"year": year}, "images": images, "annotations": annotations[::-1], "categories": listed
        }  # fmt: skip
    return files, contents


def places365(size: str = "256") -> tuple[dict[str, Any], dict[str, Contents]]:
    classes = ("airfield", "arena/rodeo", "zen_garden")
    files: dict[str, Any] = {
        "categories_places365.txt": "".join(f"/{name[0]}/{name} {number}\n" for number, name in enumerate(classes)),
        "places365_test.txt": "Places365_test_00000001.jpg\n",
        f"test_{size}/Places365_test_00000001.jpg": 900,
        "train_256_places365standard.tar": "the archive that was unpacked",
    }
    contents: dict[str, Contents] = {"train": {}, "val": {}}
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(12):
        label, name = number % 3, classes[number % 3]
        path = f"{name[0]}/{name}/{number // 3:08d}.jpg"  # the same base names in all classes
        contents["train"][f"data_{size}/{path}"] = (number, name)
        lines["train"].append(f"/{path} {label}")
    for number in range(6):
        path = f"Places365_val_{number:08d}.jpg"
        contents["val"][f"val_{size}/{path}"] = (100 + number, classes[-number % 3])
        lines["val"].append(f"{path} {-number % 3}")
    for part in contents.values():
        files |= {path: number for path, (number, _) in part.items()}
    files["places365_train_standard.txt"] = "\n".join(lines["train"]) + "\n"
    files["places365_val.txt"] = "\n".join(lines["val"]) + "\n"
    return files, contents


def places205() -> tuple[dict[str, Any], dict[str, Contents]]:
    classes = ("abbey", "apartment_building/outdoor", "yard")
    files: dict[str, Any] = {}
    contents: dict[str, Contents] = {}
    for split, first, count in (("train", 0, 12), ("val", 100, 6)):
        contents[split], lines = {}, []
        for number in range(first, first + count):
            name = classes[number % 3]
            path = f"{name[0]}/{name}/gsun_{number:032x}.jpg"
            lines.append(f"{path} {number % 3}\n")
            contents[split][f"data/vision/torralba/deeplearning/images256/{path}"] = (number, name)
        files |= {path: number for path, (number, _) in contents[split].items()}
        files[f"trainvalsplit_places205/{split}_places205.csv"] = "".join(lines)
    return files, contents


def places365_easy() -> tuple[dict[str, Any], dict[str, Contents]]:
    """Places365-Standard with "easy directory structure": an ImageFolder."""
    contents: dict[str, Contents] = {
        split: {
            f"places365_standard/{split}/{name}/{number:08d}.jpg": (number, name)
            for number, name in enumerate(2 * ["airfield", "arena-rodeo", "zen_garden"], first)
        }
        for split, first in (("train", 0), ("val", 100))
    }
    files: dict[str, Any] = {path: number for part in contents.values() for path, (number, _) in part.items()}
    return files, contents


CLASSES = {
    "inat2018": ("c zero", "c two", "c five"),
    "inat2019": ("c zero", "c two", "c five"),
    "places365": ("airfield", "arena/rodeo", "zen_garden"),
    "places365_large": ("airfield", "arena/rodeo", "zen_garden"),
    "places205": ("abbey", "apartment_building/outdoor", "yard"),
    "places365_easy": ("airfield", "arena-rodeo", "zen_garden"),
}
SETS = {
    "inat2018": lambda: inaturalist(2018),
    "inat2019": lambda: inaturalist(2019),
    "places365": places365,
    "places365_large": lambda: places365("large"),
    "places205": places205,
    "places365_easy": places365_easy,
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_as_it_is_unpacked_becomes_shards(name, write, make_jpeg, tmp_path):
    """Every image is in its split with its bytes and its class, no other image is there, and finetuning takes it."""
    files, contents = SETS[name]()
    place = write(name, files)
    if name == "places365_easy":
        place = place / "places365_standard"
    lines: list[str] = []
    made = make_shards(place, tmp_path / "shards", tiles=False, report=lines.append)
    assert list_splits(place) == list_splits(made.folder) == ("train", "validation")
    assert made.class_names == CLASSES[name]
    assert made.rows == {"train": len(contents["train"]), "validation": len(contents["val"])}
    assert "of 3 classes" in lines[-1]
    for split, part in (("train", contents["train"]), ("validation", contents["val"])):
        for source in (open_source(place, split), open_source(made.folder, split)):
            assert source.class_names == CLASSES[name]
            samples = read_rows(source, range(source.num_rows))
            got = {sample.path: (sample.data, CLASSES[name][sample.label]) for sample in samples}
            below = "" if name != "places365_easy" else "places365_standard/"
            assert got == {
                path.removeprefix(below): (make_jpeg(number), label) for path, (number, label) in part.items()
            }
    train, validation = (open_source(made.folder, split) for split in ("train", "validation"))
    assert read_classes(train, validation) == list(CLASSES[name])


def test_training_takes_the_folder_itself(write, tmp_path):
    """--data with the unpacked set: it is packed below the runs' data first, like any folder of images."""
    files, contents = places205()
    place = write("set", files)
    assert layout_of(place) == "files"
    train, validation = open_for_training(str(place), tmp_path / "data", 1000)
    assert (train.num_rows, validation.num_rows) == (12, 6)
    assert train.exact_reads
    assert sorted(validation.read_labels()) == sorted(number % 3 for number, _ in contents["val"].values())


def test_unobfuscated_names_take_the_place_of_those_of_the_competition(write, tmp_path):
    files, _ = inaturalist(2018)
    place = write("set", files)
    make_shards(place, tmp_path / "out", tiles=False, report=lambda line: None)
    names = {0: "Rosa canina", 2: "Sitta europaea", 5: "Parus major"}
    write("set", {"categories.json": [{"id": number, "name": name} for number, name in reversed(names.items())]})
    assert open_source(place).class_names == tuple(names.values())
    again = make_shards(place, tmp_path / "out", tiles=False, overwrite=True, report=lambda line: None)
    assert again.made  # nothing but the names has changed
    assert again.class_names == tuple(names.values())

    write("set", {"categories.json": [{"id": number, "name": "a fern"} for number in (5, 2, 0)]})
    assert open_source(place).class_names == ("0 a fern", "2 a fern", "5 a fern")
    write("set", {"categories.json": [{"id": 1, "name": "Rosa"}]})
    with pytest.raises(DataError, match=r"1 categories that are not the 3 of the annotations.* the same year"):
        open_source(place)
    write("set", {"categories.json": {"categories": 1}})
    with pytest.raises(DataError, match="not a list of categories with id and name"):
        open_source(place)


def test_an_empty_image_is_a_row_that_is_counted(write, tmp_path):
    files, contents = places365()
    place = write("set", files)
    (place / next(iter(contents["train"]))).write_bytes(b"")
    made = make_shards(place, tmp_path / "out", tiles=False, report=lambda line: None)
    assert (made.rows["train"], made.num_broken) == (12, 1)


Change = Callable[[dict[str, Any]], None]


def drop(*names: str) -> Change:
    def change(files: dict[str, Any]) -> None:
        for name in names:
            del files[name]

    return change


def within(name: str, key: str, edit: Callable[[list[Any]], None]) -> Change:
    return lambda files: edit(files[name][key])


def text(name: str, old: str, new: str) -> Change:
    def change(files: dict[str, Any]) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


PARROT = "train_val2018/Aves/5/" + 32 * "0" + ".jpg"
ABBEY = "trainvalsplit_places205/train_places205.csv"
MISTAKES: list[tuple[str, Change, str]] = [
    ("inat2018", drop("val2018.json"), r"looks like iNaturalist, .* its validation images is missing: put train2018"),
    ("inat2018", drop("val2018.json", "train2018.json"), r"list of its train images is missing"),
    ("inat2018", drop(PARROT), r"1 of the 12 images of train2018.json are not in .*, such as train_val2018/Aves/5"),
    ("inat2018", within("train2018.json", "annotations", list.pop), r"1 of the 12 images of .* have no annotation"),
    ("inat2018", within("train2018.json", "categories", list.pop), r"4 of the 12 images .* not in its list of cat"),
    ("inat2018", within("train2018.json", "annotations", lambda a: a.append(dict(a[0]))), r"13 annotations of 12"),
    ("inat2018", within("val2018.json", "categories", lambda c: c[0].update(name="?")), r"val2018.json has other"),
    ("inat2018", within("train2018.json", "images", list.clear), r"train2018.json names no image"),
    ("inat2018", lambda files: files["val2018.json"].pop("images"), r"val2018.json is not in COCO's form"),
    ("inat2018", lambda files: files.update({"val2018.json": '{"images": ['}), r"val2018.json cannot be read \(Exp"),
    ("inat2018", lambda files: files.update({"train2019.json": {}}), r"several lists of train images, train2018.json"),
    ("inat2018", lambda files: files.update(places205()[0]), r"holds several sets, iNaturalist and Places205"),
    ("places365", drop("places365_train_standard.txt", "places365_val.txt"), r"looks like Places365"),
    ("places365", lambda files: files.update(places365("large")[0]), r"fits the images in data_256/ and in data_lar"),
    ("places365", text("places365_val.txt", "1.jpg 2", "1.jpg 3"), r"00000001.jpg the class 3, .* the classes 0 to 2"),
    ("places365", text("places365_train_standard.txt", "00.jpg 1", "00.jpg"), r"line 2 of .* is '/a/arena/rodeo/0000"),
    ("places205", drop(ABBEY), r"looks like Places205, but the list of its train images"),
    ("places205", text(ABBEY, ".jpg 1", ".jpg 3"), r"not numbered from 0 without gaps"),
    ("places205", text(ABBEY, "y/yard", "a/abbey"), r"each with a folder of its own"),
    ("places205", lambda files: files.update({ABBEY: "\n"}), r"train_places205.csv names no image"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_mistakes_are_told_before_anything_is_written(name, change, message, write, tmp_path):
    files, _ = SETS[name]()
    change(files)
    with pytest.raises(DataError, match=message):
        make_shards(write("set", files), tmp_path / "out", report=lambda line: None)
    assert not list((tmp_path / "out").iterdir())


def test_archives_that_are_not_unpacked(write):
    files, _ = places365()
    archived = {name: content for name, content in files.items() if not name.endswith(".jpg")}
    with pytest.raises(DataError, match=r"has places365_train_standard.txt, but no image: unpack the archives"):
        open_source(write("set", archived))


def test_the_lists_themselves_are_no_place(write):
    place = write("set", places365()[0])
    with pytest.raises(DataError, match="has the classes of the images beside it: give the folder"):
        open_source(place / "places365_val.txt")
    place = write("other", inaturalist(2018)[0])
    with pytest.raises(DataError, match="annotations are read from their folder"):
        open_source(place / "train2018.json")


def test_images_alone_are_taken_without_classes(write):
    place = write("set", {name: content for name, content in inaturalist(2018)[0].items() if name.endswith(".jpg")})
    for unlabelled in (place / "train_val2018", f"{place}/train_val*/*/*/*.jpg"):
        source = open_source(unlabelled)
        assert (source.num_rows, source.has_labels) == (18, False)


def test_tiny_imagenet(write):
    files: dict[str, Any] = {"wnids.txt": "n02\nn01\n", "words.txt": "n01\tfish\nn02\tfrog\n"}
    for number in range(8):
        name = f"n0{number % 2 + 1}"
        files[f"train/{name}/images/{name}_{number}.JPEG"] = number
        files[f"train/{name}/{name}_boxes.txt"] = f"{name}_{number}.JPEG\t0\t0\t9\t9\n"
        files[f"val/images/val_{number}.JPEG"] = 100 + number
        files[f"test/images/test_{number}.JPEG"] = 200 + number
    lines = [f"val_{number}.JPEG\tn0{2 - number % 2}\t0\t0\t9\t9\n" for number in range(8)]
    folder = write("tiny", files | {"val/val_annotations.txt": "".join(lines)})
    assert list_splits(folder) == ("train", "validation", "test")
    assert open_source(folder).class_names == ("n01", "n02")
    assert open_source(folder).read_labels().tolist() == [0] * 4 + [1] * 4
    assert open_source(folder, "validation").read_labels().tolist() == [1, 0] * 4
    assert set(open_source(folder, "test").read_labels()) == {-1}
    notes = [note.what for met in open_source(folder).met for note in met.notes]
    assert notes == ["images of the split test have no class"]
    made = make_shards(folder, folder.parent / "shards", report=lambda line: None)
    assert read_classes(open_source(made.folder), open_source(made.folder, "validation")) == ["n01", "n02"]
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\t0\n")
    with pytest.raises(
        DataError, match=r"line 1 of .*val_annotations\.txt is .* not an image and one of the 2 classes"
    ):
        open_source(folder)
