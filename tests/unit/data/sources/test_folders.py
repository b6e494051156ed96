"""Image files in folders and in lists: which are read, in which split, of which class."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from mixmae.data.images.decode import READS_HEIC, decode_rgb, image_size
from mixmae.data.source import DataError
from mixmae.data.sources import layout_of, list_splits, open_source
from tests.factories import all_samples


def test_a_flat_folder(write_files):
    folder = write_files(*(f"{i:03d}.jpg" for i in range(150)))
    source = open_source(folder)
    assert list(source.chunk_sizes) == [64, 64, 22]
    assert not source.has_labels
    assert layout_of(folder) == "files"


def test_classes_and_splits_of_folders(write_files):
    folder = write_files(*(f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ba" for i in range(3)))
    assert list_splits(folder) == ("train", "validation")
    held_out = open_source(folder, "validation")
    assert held_out.class_names == ("a", "b")
    assert [(sample.path, sample.label) for sample in all_samples(held_out)][2:4] == [
        ("val/a/2.png", 0),
        ("val/b/0.png", 1),
    ]


def test_a_dev_folder_is_a_validation_split(write_files):
    folder = write_files("train/a/1.jpg", "train/b/2.jpg", "dev/a/3.jpg", "dev/b/4.jpg")
    assert list_splits(folder) == ("train", "validation")
    assert [sample.path for sample in all_samples(open_source(folder, "validation"))] == [
        "dev/a/3.jpg",
        "dev/b/4.jpg",
    ]
    both = write_files("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg", "dev/a/5.jpg", below="both")
    assert [sample.path for sample in all_samples(open_source(both, "validation"))] == [
        "dev/a/5.jpg",
        "val/a/3.jpg",
        "val/b/4.jpg",
    ]


def numbered(*folders: str, count: int = 10) -> list[str]:
    return [f"{folder}/{number:03d}.jpg" for folder in folders for number in range(count)]


@pytest.mark.parametrize(
    ("names", "splits", "classes"),
    [
        (numbered("bicycle", "bus", "car", "train"), {"train": 40}, ("bicycle", "bus", "car", "train")),
        (numbered("contest", "dev", "test"), {"train": 30}, ("contest", "dev", "test")),
        (numbered("car", "train", "bus", "test"), {"train": 40}, ("bus", "car", "test", "train")),
        (numbered("Training/a", "Training/b", "Testing/a", "Testing/b"), {"train": 20, "test": 20}, ("a", "b")),
        (numbered("train/a", "train/b", "testing/a", "testing/b"), {"train": 20, "test": 20}, ("a", "b")),
        (numbered("TRAIN/a", "TRAIN/b", "Valid/a", "EVAL/b"), {"train": 20, "validation": 10, "test": 10}, ("a", "b")),
        (numbered("x/y/train/a", "x/y/train/b", "x/y/val/a"), {"train": 20, "validation": 10}, ("a", "b")),
        (numbered("train", "val", "test"), {"train": 10, "validation": 10, "test": 10}, None),
        (numbered("val/a", "val/b", "test/a"), {"validation": 20, "test": 10}, ("a", "b")),
        (numbered("flowers/daisy", "flowers/rose"), {"train": 20}, ("daisy", "rose")),
        (numbered("cat"), {"train": 10}, ("cat",)),
        (numbered("2019/spring/sea", "2019/autumn", "2020"), {"train": 30}, None),
        (numbered("train/n01/images", "train/n02/images"), {"train": 20}, ("n01", "n02")),
    ],
)  # fmt: skip
def test_splits_and_classes(write_files, names, splits, classes):
    folder = write_files(*names)
    assert {split: open_source(folder, split).num_rows for split in list_splits(folder)} == splits
    source = open_source(folder, next(iter(splits)))
    assert source.class_names == classes
    for sample in all_samples(source):
        expected = next(part for part in sample.path.split("/") if part in classes) if classes else None
        assert (source.class_names[sample.label] if classes else None) == expected


def notes_of(source) -> list[str]:
    return [str(note) for met in source.met for note in met.notes]


@pytest.mark.parametrize(
    ("stray", "label", "note"),
    [
        (
            "preview.jpg",
            -1,
            "images outside the folders of the classes have no class: 1 (preview.jpg); move them into one",
        ),
        ("cat/more/x.jpg", 0, "images deeper inside a class's folder than others have its class: 1 (cat/more/x.jpg)"),
        ("other/more/x.jpg", -1, "images outside the folders of the classes have no class: 1 (other/more/x.jpg); move"),
    ],
)
def test_a_stray_image_does_not_remove_the_classes(write_files, stray, label, note):
    source = open_source(write_files(*numbered("cat", "dog", count=20), stray))
    assert source.class_names == ("cat", "dog")
    labels = {sample.path: sample.label for sample in all_samples(source)}
    assert labels[stray] == label
    assert [labels[f"{name}/003.jpg"] for name in ("cat", "dog")] == [0, 1]
    assert len(notes_of(source)) == 1
    assert notes_of(source)[0].startswith(note)


def test_what_is_left_out_is_named(write_files):
    folder = write_files(*numbered("train/a", "train/b", "val/a"), *numbered("extra", count=4), "cover.jpg")
    for name in (".ipynb_checkpoints/x.jpg", "train/a/._1.jpg", "photo_1", "IMG_1.CR2", "IMG_2.cr2", "a.jpg_large"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "train" / "empty").mkdir()
    source = open_source(folder)
    assert source.num_rows == 20
    move = "move them into train, val, or give them as a source of their own"
    raw = "export them as JPEG or TIFF"
    suffix = "if they are images, let them end in .jpg or .png"
    assert sorted(notes_of(source)) == [
        f"files ending in .cr2 are left out: 2 (such as IMG_1.CR2); {raw}",
        f"files ending in .jpg_large are left out: 1 (a.jpg_large); {suffix}",
        f"files without a known suffix are left out: 1 (photo_1); {suffix}",
        "folders hold no image: 1 (train/empty)",
        "hidden files are left out: 2 (such as .ipynb_checkpoints/x.jpg); rename those that you need",
        f"images beside the folders of the splits are left out: 1 (cover.jpg); {move}",
        f"images in the folder extra/ are left out: 4 (such as extra/000.jpg); {move}",
    ]


def test_a_validation_folder_without_classes(write_files):
    names = [*numbered("train/n01/images", "train/n02/images"), *numbered("val/images", "test/images")]
    folder = write_files(*names)
    assert open_source(folder).class_names == ("n01", "n02")
    assert set(open_source(folder, "validation").read_labels()) == {-1}
    assert sorted(note.partition(";")[0] for note in notes_of(open_source(folder))) == [
        "images of the split test have no class: 10 (such as test/images/000.jpg)",
        "images of the split validation have no class: 10 (such as val/images/000.jpg)",
    ]


def test_names_that_are_not_utf8(tmp_path, make_jpeg):
    folder = tmp_path / "été"
    folder.mkdir()
    for number, name in enumerate((b"a.jpg", b"caf\xe9.jpg", "写真.jpg".encode(), b"line\nend.jpg")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as stream:
            stream.write(make_jpeg(number))
    source = pickle.loads(pickle.dumps(open_source(folder)))
    read = {sample.path: sample.data for sample in all_samples(source)}
    names = ("a.jpg", "caf\\xe9.jpg", "写真.jpg", "line\nend.jpg")
    assert read == {name: make_jpeg(number) for number, name in enumerate(names)}
    assert source.where(1) == f"{folder}/caf\\xe9.jpg"
    source.where(1).encode()
    assert source.digest == open_source(folder).digest
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbf\xc3\xa9t\xc3\xa9/caf\xe9.jpg\tcat\r\n\xc3\xa9t\xc3\xa9/a.jpg\tdog\r\n"
    )
    listed = open_source(tmp_path / "list.txt")
    assert [(sample.data, sample.label) for sample in all_samples(listed)] == [(make_jpeg(1), 0), (make_jpeg(0), 1)]
    (tmp_path / "windows.txt").write_text("été/a.jpg\tcat\nété/写真.jpg\tdog\n", encoding="utf-16")
    assert [sample.data for sample in all_samples(open_source(tmp_path / "windows.txt"))] == [
        make_jpeg(0),
        make_jpeg(2),
    ]


def test_paths_and_numbers(write_files, make_jpeg, tmp_path):
    folder = write_files("a.jpg", "b c.jpg", below="elsewhere")
    names = tmp_path / "list.txt"
    names.write_text(f"# mine\nelsewhere/b c.jpg\t4\n\n{folder}/a.jpg\n")
    source = open_source(names)
    assert [(sample.data, sample.label) for sample in all_samples(source)] == [
        (make_jpeg(1), 4),
        (make_jpeg(0), -1),
    ]
    assert source.where(1) == f"{folder}/a.jpg"
    assert source.class_names is None
    assert layout_of(names) == "list"


def test_class_names(write_files, tmp_path):
    write_files("a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "list.tsv").write_text("photos/a.jpg\temu\nphotos/b.jpg\tcat\nphotos/c.jpg\n")
    source = open_source(tmp_path / "list.tsv")
    assert source.class_names == ("cat", "emu")
    assert [sample.label for sample in all_samples(source)] == [1, 0, -1]


def test_bad_lists(write_files, tmp_path):
    write_files("a.jpg")
    names = tmp_path / "list.txt"
    names.write_text("photos/a.jpg\nphotos/b.jpg\n")
    with pytest.raises(DataError, match=r"1 of the 2 files in .* do not exist, such as photos/b.jpg in line 2"):
        open_source(names)
    names.write_text("\n")
    with pytest.raises(DataError, match="names no file"):
        open_source(names)
    names.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="must be text in UTF-8"):
        open_source(names)


@pytest.mark.skipif(READS_HEIC, reason="the extra heic is installed")
def test_photos_of_phones_without_the_extra(write_files):
    folder = write_files("a.jpg")
    (folder / "IMG_1.HEIC").write_bytes(b"x")
    heic = "convert them to JPEG, or install pillow-heif (pip install 'mixmae[heic]'), which reads them"
    assert notes_of(open_source(folder)) == [f"files ending in .heic are left out: 1 (IMG_1.HEIC); {heic}"]


@pytest.mark.skipif(not READS_HEIC, reason="the extra heic is not installed")
def test_photos_of_phones_with_the_extra(tmp_path):
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (96, 64), (200, 30, 30))
    pillow_heif.from_pillow(photo).save(tmp_path / "IMG_1.HEIC", quality=90, exif=exif.tobytes())
    (sample,) = all_samples(open_source(tmp_path))
    assert decode_rgb(sample.data).shape == (96, 64, 3)
    assert image_size(sample.data) == (96, 64)
    assert np.abs(decode_rgb(sample.data).mean(axis=(0, 1)) - [200, 30, 30]).max() < 8
