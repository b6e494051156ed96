"""WebDataset tars, with an index that is kept and made again."""

from __future__ import annotations

import io
import pickle

import pytest
from PIL import Image

from mixmae.data.source import DataError
from mixmae.data.sources import open_source
from tests.factories import all_samples, write_tar


@pytest.fixture
def tar(tmp_path):
    """Writes a tar of (name, bytes) members below one folder."""
    return lambda name, members, mode="w": write_tar(tmp_path / "tars" / name, members, mode)


def test_webdataset(tar, make_jpeg):
    png = io.BytesIO()
    Image.new("RGB", (5, 5)).save(png, "PNG")
    members = []
    for i in range(70):
        members += [(f"{i:04d}.jpg", make_jpeg(i)), (f"{i:04d}.cls", str(i % 3).encode()), (f"{i:04d}.json", b"{}")]
    tar("set-train-0000.tar", members)
    tar(
        "set-train-0001.tar",
        [
            ("d/x.y.json", b'{"label": 7}'),
            ("d/x.png", png.getvalue()),
            ("d/" + 150 * "n" + ".WEBP", b"later broken"),
            ("z.cls", b"4"),
            ("notes.txt", b"no image"),
        ],
    )
    folder = tar("set-validation-0000.tar", members[:6]).parent
    (folder / "classnames.txt").write_text("".join(f"class {i}\n" for i in range(8)))
    for _ in range(2):  # the second time from the kept index
        source = pickle.loads(pickle.dumps(open_source(folder)))
        assert list(source.chunk_sizes) == [64, 6, 2]
        samples = all_samples(source)
        assert [sample.data for sample in samples[:70]] == [make_jpeg(i) for i in range(70)]
        assert [sample.label for sample in samples] == [*(i % 3 for i in range(70)), -1, -1]
        assert [sample.data for sample in samples[70:]] == [png.getvalue(), b"later broken"]
        assert source.read(2, [1])[0].path == "d/" + 150 * "n" + ".WEBP"
        assert source.where(70) == f"{folder}/set-train-0001.tar / d/x.png"
        assert source.class_names is not None
        assert source.class_names[2] == "class 2"
    assert (folder / ".set-train-0000.tar.index").exists()
    assert open_source(folder, "validation").num_rows == 2


def test_labels_in_json(tar, make_jpeg):
    path = tar("a.tar", [("1.json", b'{"label": 7}'), ("1.jpg", make_jpeg(0)), ("2.jpg", make_jpeg(1))])
    assert [sample.label for sample in all_samples(open_source(path))] == [7, -1]


def test_a_changed_tar_is_read_again(tar, make_jpeg):
    path = tar("a.tar", [("1.jpg", make_jpeg(0))])
    first = open_source(path)
    assert first.num_rows == 1
    tar("a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(20)])
    assert open_source(path).num_rows == 20
    assert open_source(path).digest != first.digest


def test_bad_tars(tar, make_jpeg):
    whole = tar("a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(5)])
    data = whole.read_bytes()
    for kept in (5000, 700):
        whole.write_bytes(data[:kept])
        with pytest.raises(DataError, match=r"a\.tar is not a whole tar file"):
            open_source(whole)
    tar("a.tar", [("1.jpg", make_jpeg(0))], "w:gz")
    with pytest.raises(DataError, match="it is compressed: unpack"):
        open_source(whole)
    tar("a.tar", [("1.cls", b"0")])
    with pytest.raises(DataError, match="holds no image"):
        open_source(whole)
    whole.write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be used \(empty\)"):
        open_source(whole)


def labels_of(source) -> list[str | int]:
    names = source.class_names
    return [names[sample.label] if names and sample.label >= 0 else sample.label for sample in all_samples(source)]


def notes_of(source) -> list[str]:
    return [str(note) for met in source.met for note in met.notes]


DOUBLE = bytes.fromhex("00051607000200004d6163204f5320582020202020202020") + bytes(139)
"""What macOS stores beside each file: it begins like this."""


@pytest.mark.parametrize(
    ("members", "labels", "notes"),
    [
        pytest.param(
            [*((f"{i}.jpg", None) for i in range(8)), *((f"{i}.cls", b"%d" % (i % 4)) for i in range(8))],
            [0, 1, 2, 3] * 2, [], id="labels behind all images",
        ),
        pytest.param(
            [(f"./{dots}{i}{suffix}", DOUBLE if dots else content)
             for i in range(4) for suffix, content in ((".jpg", None), (".cls", b"%d" % i)) for dots in ("._", "")],
            [0, 1, 2, 3], ["hidden members of tars are left out: 8 (such as ./._0.jpg)"], id="macOS",
        ),
        pytest.param(
            [(f"Screenshot 2023-01-05 at 10.11.{i:02d}.png", None) for i in range(8)], [-1] * 8, [], id="dots",
        ),
        pytest.param(
            [(name, None) for name in ("IMG.2020.01.jpg", "IMG.2020.02.jpg", "PIC.2020.01.jpg", "x.jpg", "x.2.jpg")],
            [-1] * 5, [], id="dates and numbers, also in several names",
        ),
        pytest.param(
            [(f"n01/img.v1.{i:02d}{suffix}", content)
             for i in range(8) for suffix, content in ((".jpg", None), (".cls", b"%d" % (i % 4)))],
            [0, 1, 2, 3] * 2, [], id="dots and labels",
        ),
        pytest.param(
            [(f"{i}.{field}", content) for i in range(4)
             for field, content in (("mask.png", None), ("jpg", None), ("cls", b"%d" % i))],
            [0, 1, 2, 3],
            ["further images of a sample are left out: 4 (such as 0.mask.png); give each a name of its own"],
            id="fields beside the image",
        ),
        pytest.param(
            [(f"{i}.{field}", content) for i in range(4)
             for field, content in (("left.png", None), ("right.png", None), ("json", b'{"label": %d}' % i))],
            [0, 1, 2, 3],
            ["further images of a sample are left out: 4 (such as 0.right.png); give each a name of its own"],
            id="fields alone",
        ),
        pytest.param(
            [(f"{i}{suffix}", content) for i in range(4) for suffix, content in
             ((".jpg", None), (".cls", (b"cat", b"a dog")[i % 2] + b"\n"))],
            ["cat", "a dog"] * 2, [], id="names in .cls",
        ),
        pytest.param(
            [(f"{i}{suffix}", content) for i in range(4) for suffix, content in
             ((".jpg", None), (".json", b'{"caption": "x", "class_name": "%s"}' % (b"cat", b"dog")[i % 2]))],
            ["cat", "dog"] * 2, [], id="names in .json",
        ),
        pytest.param(
            [("0.jpg", None), ("0.cls", b"1.0"), ("1.jpg", b""), ("1.cls", b"\xff\xfe"), ("2.jpg", None),
             ("3.cls", b"2"), ("4.jxl", b"x"), ("notes", b"x"), ("5.jpg", None), ("5.jpg", None)],
            [1, -1, -1, -1],
            ["files ending in .jxl are left out: 1 (4.jxl); convert them to JPEG or PNG",
             "files without a known suffix are left out: 1 (notes); if they are images, let them end in .jpg or .png",
             "labels are left out, because their images are missing: 1 (3.cls)",
             "labels cannot be read: 1 (1.cls); a .cls holds the number or the name of a class",
             "members of tars are left out, because another one of the same name follows: 1 (5.jpg)"],
            id="odd members",
        ),
    ],
)  # fmt: skip
def test_members_as_people_have_them(tar, make_jpeg, members, labels, notes):
    written = [
        (name, make_jpeg(number) if content is None else content) for number, (name, content) in enumerate(members)
    ]
    path = tar("a.tar", written)
    for _ in range(2):  # the second time from the kept index
        source = open_source(path)
        assert labels_of(source) == labels
        assert sorted(notes_of(source)) == notes
        by_name = dict(written)
        assert all(sample.data == by_name[sample.path] for sample in all_samples(source))


def test_class_names_have_the_same_numbers_in_all_splits(tar, make_jpeg):
    def members(*classes: bytes) -> list[tuple[str, bytes]]:
        pairs = [((f"{i}.jpg", make_jpeg(i)), (f"{i}.cls", name)) for i, name in enumerate(classes)]
        return [member for pair in pairs for member in pair]

    tar("train-0.tar", members(b"dog", b"emu"))
    folder = tar("val-0.tar", members(b"cat", b"emu", b"dog")).parent
    for split, labels in (("train", [1, 2]), ("validation", [0, 2, 1])):
        source = open_source(folder, split)
        assert source.class_names == ("cat", "dog", "emu")
        assert source.read_labels().tolist() == labels
    (folder / "classnames.txt").write_text("emu\ndog\n")
    source = open_source(folder, "validation")
    assert source.read_labels().tolist() == [-1, 0, 1]
    assert notes_of(source) == [
        "images have an unknown class: 1 (0.jpg ('cat')); add it to classnames.txt, or correct it"
    ]


def test_a_name_that_is_not_utf8(tmp_path, make_jpeg):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as stream:
        for number, name in enumerate(("a.jpg", "café.jpg")):
            entry = tarfile.TarInfo(name)
            entry.size = len(make_jpeg(number))
            stream.addfile(entry, io.BytesIO(make_jpeg(number)))
    source = open_source(tmp_path)
    assert [(sample.path, sample.data) for sample in all_samples(source)] == [
        ("a.jpg", make_jpeg(0)),
        ("caf\\xe9.jpg", make_jpeg(1)),
    ]


def test_the_index_goes_elsewhere_if_the_folder_cannot_be_written(tar, make_jpeg, tmp_path, monkeypatch):
    path = tar("a.tar", [("1.jpg", make_jpeg(0)), ("1.cls", b"3")])
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (path.parent / f".{path.name}.index").mkdir()  # nothing can be written there, even by root
    assert open_source(path).read_labels().tolist() == [3]
    (index,) = (cache / "mixmae" / "tars").glob("*.index")
    made = index.stat().st_mtime_ns
    assert open_source(path).read_labels().tolist() == [3]
    assert index.stat().st_mtime_ns == made  # found, not made again
