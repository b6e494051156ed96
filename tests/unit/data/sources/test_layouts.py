"""Every layout that users have, as real files: what is opened is what was stored."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.data.blocks import load_block
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.decode import MAX_PIXELS
from mixmae.data.order import Plan
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError, read_rows
from mixmae.data.sources import layout_of, list_splits, open_source, open_train_and_held_out


def all_samples(source):
    return [sample for chunk, rows in enumerate(source.chunk_sizes) for sample in source.read(chunk, range(rows))]


@pytest.fixture
def files(tmp_path, make_jpeg):
    """Writes JPEGs of their own below a folder; returns the folder."""

    def write(*names: str, below: str = "photos") -> Path:
        root = tmp_path / below
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(make_jpeg(number))
        return root

    return write


@pytest.fixture
def tar(tmp_path):
    """Writes a tar of (name, bytes) members."""

    def write(name: str, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
        path = tmp_path / "tars" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, mode) as stream:
            for member, data in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                stream.addfile(entry, io.BytesIO(data))
        return path

    return write


class TestFolders:
    def test_flat(self, files, make_jpeg):
        folder = files(*(f"{i:03d}.jpg" for i in range(150)))
        source = pickle.loads(pickle.dumps(open_source(folder)))
        assert list(source.chunk_sizes) == [64, 64, 22]
        assert [sample.data for sample in all_samples(source)] == [make_jpeg(i) for i in range(150)]
        assert source.read(1, [5, 2])[0].data == make_jpeg(69)
        assert source.where(69) == f"{folder}/069.jpg"
        assert source.exact_reads
        assert not source.has_labels
        assert layout_of(folder) == "files"

    def test_classes_and_splits(self, files):
        folder = files(*(f"{split}/{name}/{i}.png" for split in ("train", "val") for name in "ba" for i in range(3)))
        assert list_splits(folder) == ("train", "validation")
        held_out = open_source(folder, "validation")
        assert held_out.class_names == ("a", "b")
        assert [(sample.path, sample.label) for sample in all_samples(held_out)][2:4] == [
            ("val/a/2.png", 0),
            ("val/b/0.png", 1),
        ]

    def test_a_dev_folder_is_a_validation_split(self, files):
        folder = files("train/a/1.jpg", "train/b/2.jpg", "dev/a/3.jpg", "dev/b/4.jpg")
        assert list_splits(folder) == ("train", "validation")
        assert [sample.path for sample in all_samples(open_source(folder, "validation"))] == [
            "dev/a/3.jpg",
            "dev/b/4.jpg",
        ]
        both = files("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg", "dev/a/5.jpg", below="both")
        assert [sample.path for sample in all_samples(open_source(both, "validation"))] == [
            "val/a/3.jpg",
            "val/b/4.jpg",
        ]

    def test_a_file_that_vanishes_is_a_broken_row(self, files):
        folder = files("a.jpg", "b.jpg")
        source = open_source(folder)
        (folder / "a.jpg").unlink()
        first, second = all_samples(source)
        assert first.data == b""
        assert "cannot be read: No such file" in first.where
        assert second.data


class TestTars:
    def test_webdataset(self, tar, make_jpeg):
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

    def test_labels_in_json(self, tar, make_jpeg):
        path = tar("a.tar", [("1.json", b'{"label": 7}'), ("1.jpg", make_jpeg(0)), ("2.jpg", make_jpeg(1))])
        assert [sample.label for sample in all_samples(open_source(path))] == [7, -1]

    def test_a_changed_tar_is_read_again(self, tar, make_jpeg):
        path = tar("a.tar", [("1.jpg", make_jpeg(0))])
        first = open_source(path)
        assert first.num_rows == 1
        tar("a.tar", [(f"{i}.jpg", make_jpeg(i)) for i in range(20)])
        assert open_source(path).num_rows == 20
        assert open_source(path).digest != first.digest

    def test_bad_tars(self, tar, make_jpeg):
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


class TestFileLists:
    def test_paths_and_numbers(self, files, make_jpeg, tmp_path):
        folder = files("a.jpg", "b c.jpg", below="elsewhere")
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

    def test_class_names(self, files, tmp_path):
        files("a.jpg", "b.jpg", "c.jpg")
        (tmp_path / "list.tsv").write_text("photos/a.jpg\temu\nphotos/b.jpg\tcat\nphotos/c.jpg\n")
        source = open_source(tmp_path / "list.tsv")
        assert source.class_names == ("cat", "emu")
        assert [sample.label for sample in all_samples(source)] == [1, 0, -1]

    def test_bad_lists(self, files, tmp_path):
        files("a.jpg")
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


class TestGlobs:
    def test_images(self, files):
        folder = files("a/1.jpg", "a/2.png", "b/3.jpg", "b/c/4.jpg", "b/notes.md")
        assert open_source(folder / "*" / "*.jpg").num_rows == 2
        assert open_source(f"{folder}/**/*.jpg").num_rows == 3
        assert open_source(f"{folder}/{{a,b}}/*.jpg").class_names == ("a", "b")
        assert open_source(f"{folder}/?/").num_rows == 4  # folders: what is in them
        with pytest.raises(DataError, match=r"nothing matches .*/\*.webp"):
            open_source(f"{folder}/*.webp")

    def test_shards(self, write_shards, tmp_path, files):
        folder = write_shards(10, 20, 30)
        assert open_source(f"{folder}/train-*.parquet").num_rows == 60
        braces = open_source(f"{folder}/train-{{00000..00001}}-of-00003.parquet")
        assert braces.num_rows == 30
        assert braces.exact_reads
        with pytest.raises(DataError, match=r"nothing matches .*train-00003-of"):
            open_source(f"{folder}/train-{{00000..00003}}-of-00003.parquet")
        files("a.jpg", below="shards")
        with pytest.raises(DataError, match=r"matches files of several sources \(files, parquet\)"):
            open_source(f"{folder}/*")

    def test_a_name_with_brackets_is_a_name(self, files):
        assert open_source(files("1.jpg", below="photos [2019]")).num_rows == 1


def test_file_uris(files, write_shards):
    folder = files("a b.jpg", "c.jpg")
    assert open_source(folder.as_uri()).num_rows == 2
    assert open_source(write_shards(12).as_uri()).where(3).startswith("/")
    with pytest.raises(DataError, match="such as s3://bucket/prefix"):
        open_source("nope://bucket/x")


class TestSeveral:
    @pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.25, 2), (2.5, 0.1), (1.4, 1)])
    def test_each_row_comes_floor_or_ceil_of_its_weight(self, files, write_shards, weights):
        places = [files(*(f"{i}.jpg" for i in range(100))), write_shards(90, 41)]
        joined = open_source(list(zip(places, weights, strict=True)))
        assert pickle.loads(pickle.dumps(joined)).digest == joined.digest
        counts = Counter(sample.where for sample in all_samples(joined))
        assert sum(counts.values()) == joined.num_rows == joined.chunk_sizes.sum()
        for place, weight, size in zip(places, weights, (100, 131), strict=True):
            times = [counts[sample.where] for sample in all_samples(open_source(place))]
            assert min(times) >= np.floor(weight)
            assert max(times) <= np.ceil(weight)
            assert sum(times) == round(weight * size)
        for row in (0, joined.num_rows // 2, joined.num_rows - 1):
            assert joined.where(row) == read_rows(joined, [row])[0].where
        plan = Plan(chunk_sizes=joined.chunk_sizes, seed=1, window_rows=64)
        assert sorted(plan.rows_at(0, joined.num_rows)[0]) == list(range(joined.num_rows))

    @pytest.mark.parametrize("weights", [(2, 1), (0.5, 12.25), (1, 1)])
    def test_no_copy_of_a_held_out_image_is_trained_on(self, files, tmp_path, weights):
        places = [files(*(f"{i}.jpg" for i in range(count)), below=name) for name, count in (("a", 100), ("b", 40))]
        for path in places[1].iterdir():  # other bytes than the same number in the first folder
            path.write_bytes(path.read_bytes() + b"b")
        mixture = list(zip(places, weights, strict=True))
        train, held_out = open_train_and_held_out(mixture, 10)
        places_of = [Counter(source.where(row) for row in range(source.num_rows)) for source in (train, held_out)]
        assert len(places_of[1]) == held_out.num_rows == 10
        assert not places_of[0].keys() & places_of[1].keys()
        joined = open_source(mixture)
        copies = Counter(zip((joined.where(row) for row in range(joined.num_rows)), joined.stored_rows, strict=True))
        assert len(copies) == len({place for place, _ in copies}) == len({number for _, number in copies})

        (tmp_path / "mix.json").write_text(
            json.dumps([{"source": str(place), "weight": weight} for place, weight in mixture])
        )
        made = make_shards(tmp_path / "mix.json", tmp_path / "out", tiles=False, report=lambda line: None).folder
        stored = [{sample.data for sample in all_samples(open_source(made, s))} for s in ("train", "validation")]
        assert not stored[0] & stored[1]
        assert len(stored[1]) == open_source(made, "validation").num_rows >= 7

    def test_classes_are_joined_by_name(self, files, write_shards):
        photos = files("dog/1.jpg", "newt/2.jpg")
        joined = open_source([write_shards(5), photos])  # cat, dog, emu
        assert joined.class_names == ("cat", "dog", "emu", "newt")
        assert [sample.label for sample in all_samples(joined)] == [0, 1, 2, 0, 1, 1, 3]
        flat = files("x.jpg", below="flat")
        with_unlabelled = open_source([flat, photos])
        assert with_unlabelled.class_names == ("dog", "newt")
        assert [sample.label for sample in all_samples(with_unlabelled)] == [-1, 0, 1]

    def test_classes_have_the_same_numbers_in_all_splits(self, files):
        first = files("train/dog/1.jpg", "train/newt/2.jpg", below="first")
        second = files("train/ant/1.jpg", "train/cat/2.jpg", "val/ant/3.jpg", "val/cat/4.jpg", below="second")
        assert open_source([first, second]).class_names == ("dog", "newt", "ant", "cat")
        held_out = open_source([first, second], "validation")
        assert held_out.class_names == ("dog", "newt", "ant", "cat")
        assert [sample.label for sample in all_samples(held_out)] == [2, 3]
        assert held_out.where(1).endswith("val/cat/4.jpg")

    def test_numbers_beside_names_are_no_classes(self, files, tmp_path):
        photos = files("dog/1.jpg", "newt/2.jpg")
        (tmp_path / "list.txt").write_text("photos/dog/1.jpg\t1\n")
        joined = open_source([photos, tmp_path / "list.txt"])
        assert joined.class_names is None
        assert not joined.has_labels
        assert {sample.label for sample in all_samples(joined)} == {-1}
        (tmp_path / "photos").rename(tmp_path / "train_photos")
        held_out = files("train/dog/1.jpg", "train/newt/2.jpg", "val/dog/1.jpg", "val/newt/3.jpg")
        (tmp_path / "list.txt").write_text("photos/train/dog/1.jpg\t1\n")
        assert not open_source([held_out, tmp_path / "list.txt"], "validation").has_labels

    def test_a_list_in_a_file(self, files, write_shards, tmp_path):
        files("1.jpg", "2.jpg")
        write_shards(6)
        write_shards(4, split="validation")
        (tmp_path / "mix.json").write_text(json.dumps(["photos", {"source": "shards", "weight": 2}]))
        assert open_source(tmp_path / "mix.json").num_rows == 14
        assert list_splits(tmp_path / "mix.json") == ("train", "validation")
        assert open_source(tmp_path / "mix.json", "validation").num_rows == 4  # weights are for training
        for content in ("{", '{"a": 1}', "[1]", '[{"weight": 2}]'):
            (tmp_path / "mix.json").write_text(content)
            with pytest.raises(DataError, match="is not a list of sources: it must be JSON"):
                open_source(tmp_path / "mix.json")

    def test_bad_weights(self, files):
        folder = files("1.jpg")
        for weight in (0, -1, float("nan")):
            with pytest.raises(DataError, match="give a number above 0"):
                open_source([(folder, weight)])
        with pytest.raises(DataError, match="has no rows: the weights are too small"):
            open_source([(folder, 0.1)])
        with pytest.raises(DataError, match="list of data sources is empty"):
            open_source([])


def broken_files(make_jpeg) -> dict[str, bytes]:
    """One file of every kind of damage."""
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(png, "PNG")
    bomb = io.BytesIO()
    side = int(MAX_PIXELS**0.5) + 1000
    Image.new("1", (side, side)).save(bomb, "PNG")
    middle = bytearray(png.getvalue())
    middle[len(middle) // 2] ^= 0xFF
    return {
        "truncated.jpg": make_jpeg(0)[:-400],
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "movie.jpg": b"\x00\x00\x00\x18ftypmp42" + bytes(500),
        "header.jpg": make_jpeg(0)[:20],
        "short.png": png.getvalue()[:-600],
        "flipped.png": bytes(middle),
        "bomb.png": bomb.getvalue(),
        "zeros.webp": bytes(2000),
    }


@pytest.mark.parametrize("layout", ["folder", "tar", "shards"])
def test_half_a_percent_of_broken_files_gives_a_complete_ledger(tmp_path, make_jpeg, layout, tar, write_shards):
    """All rows come out as images; every broken one is named once, with its place and a reason."""
    damage = broken_files(make_jpeg)
    damage |= {f"again_{name}": data for name, data in list(damage.items())[:1]}
    good = [make_jpeg(i, 24, 24) for i in range(50)]
    total = 200 * len(damage)
    spots = {round((i + 0.5) * 200): name for i, name in enumerate(damage)}
    named = [
        (f"{row:05d}_{spots[row]}", damage[spots[row]]) if row in spots else (f"{row:05d}.jpg", good[row % 50])
        for row in range(total)
    ]
    # A wrong extension is no damage: what counts is what is in the file.
    named[7] = ("00007.png", good[7])
    if layout == "folder":
        place = tmp_path / "photos"
        place.mkdir()
        for name, data in named:
            (place / name).write_bytes(data)
    elif layout == "tar":
        place = tar("all.tar", named)
    else:
        place = write_shards(total, damaged={row: data for row, (_, data) in enumerate(named)})
    source = open_source(place)
    assert source.num_rows == total
    block = load_block(source, AugmentConfig(image_size=16), np.arange(total), np.zeros(total, dtype=np.int64), seed=0)
    assert sorted(block.broken) == sorted(spots)
    for row, name in spots.items():
        record = block.broken[row]
        assert record.row == row
        assert record.reason
        if layout != "shards":
            assert name in record.where
    assert len({record.where for record in block.broken.values()}) == len(spots)
    assert block.images.std(axis=(1, 2, 3)).min() > 0  # a good neighbour stands in
