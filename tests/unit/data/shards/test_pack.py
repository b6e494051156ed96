"""From folders of files to shards, as a user runs it; no Ray."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixmae.data.images import tiles
from mixmae.data.images.decode import decode_rgb, image_size
from mixmae.data.shards.pack import is_image_folder, make_shards
from mixmae.data.source import DataError, read_rows
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.parquet import ParquetSource

ROOT = Path(__file__).parents[4]


@pytest.fixture
def folder(tmp_path, make_jpeg):
    """Makes a folder of files from relative names; a name may come with its bytes."""

    def make(*names: str, **contents: bytes) -> Path:
        root = tmp_path / "photos"
        root.mkdir(exist_ok=True)
        for number, name in enumerate([*names, *contents]):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents.get(name, make_jpeg(number)))
        return root

    return make


def stored(path: Path, split: str) -> dict[str, tuple[bytes, int]]:
    source = open_source(path, split)
    return {
        sample.where.split(" / ")[1]: (sample.data, sample.label)
        for chunk, rows in enumerate(source.chunk_sizes)
        for sample in source.read(chunk, range(rows))
    }


def test_flat_folder_keeps_every_byte(folder, tmp_path):
    png = io.BytesIO()
    Image.new("P", (9, 7)).save(png, "PNG")
    source = folder(
        *(f"{i}.jpg" for i in range(30)), **{"odd.PNG": png.getvalue(), "empty.jpg": b"", "notes.txt": b"x"}
    )
    lines: list[str] = []
    made = make_shards(source, tmp_path / "out", tiles=False, report=lines.append)
    assert made.rows == {"train": 24, "validation": 8}  # a quarter at most is held out
    assert made.class_names is None
    assert made.num_broken == 1  # the empty file stays a row: a run counts it and names it in its ledger
    assert any("empty.jpg: the file is empty" in line for line in lines)
    both = stored(made.folder, "train") | stored(made.folder, "validation")
    assert {name: data for name, (data, _) in both.items()} == {
        path.name: path.read_bytes() for path in source.iterdir() if path.name != "notes.txt"
    }
    assert not open_source(made.folder).has_labels
    names = list(stored(made.folder, "train"))
    assert names != sorted(names)


def test_image_folder_with_classes(folder, tmp_path):
    made = make_shards(folder(*(f"{name}/{i}.jpg" for name in ("dog", "cat") for i in range(20))), tmp_path / "out")
    assert made.class_names == ("cat", "dog")
    train = stored(made.folder, "train")
    assert {label for name, (_, label) in train.items() if name.startswith("dog/")} == {1}
    assert open_source(made.folder).class_names == ("cat", "dog")


def test_train_and_val_folders(folder, tmp_path):
    names = [f"{split}/{name}/{i}.jpg" for split in ("train", "val", "test") for name in ("a", "b") for i in range(5)]
    made = make_shards(folder(*names), tmp_path / "out")
    assert made.rows == {"test": 10, "train": 10, "validation": 10}
    assert list_splits(made.folder) == ("train", "validation", "test")
    assert all(name.startswith("val/") for name in stored(made.folder, "validation"))
    assert made.class_names == ("a", "b")


def test_nested_folders_are_no_classes(folder, tmp_path):
    made = make_shards(folder(*(f"2019/{i % 3}/{i}.jpg" for i in range(20)), "2020/x.jpg"), tmp_path / "out")
    assert made.class_names is None
    assert sum(made.rows.values()) == 21


def test_hidden_files_and_link_cycles(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(9)), ".hidden.jpg", ".thumbnails/a.jpg", "__MACOSX/b.jpg")
    (source / "loop").symlink_to(source, target_is_directory=True)
    assert sum(make_shards(source, tmp_path / "out").rows.values()) == 9


def test_shards_are_small_pieces_without_compression(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(200)))
    made = make_shards(source, tmp_path / "out", shard_mb=0.1)
    files = sorted(made.folder.glob("train-*.parquet"))
    assert len(files) > 2
    assert files[-1].name == f"train-{len(files) - 1:05d}-of-{len(files):05d}.parquet"
    footer = pq.read_metadata(files[0])
    assert max(footer.row_group(group).num_rows for group in range(footer.num_row_groups)) <= 64
    assert footer.row_group(0).column(0).compression == "UNCOMPRESSED"
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert manifest["splits"]["train"]["rows"] == made.rows["train"]
    assert len(manifest["splits"]["train"]["files"][0]["sha256"]) == 64
    assert [path.name for path in made.folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_the_same_source_gives_the_same_shards(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(40)))
    first, second = (make_shards(source, tmp_path / name, workers=n) for name, n in (("a", 1), ("b", 3)))
    assert first.digest == second.digest
    assert make_shards(source, tmp_path / "c", seed=1).digest != first.digest


def test_running_again_does_nothing_until_the_source_changes(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(20)))
    made = make_shards(source, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    again = make_shards(source, tmp_path / "out")
    assert made.made
    assert not again.made
    assert again.rows == made.rows
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == times
    folder("new.jpg")
    with pytest.raises(DataError, match=r"not empty .* --overwrite"):
        make_shards(source, tmp_path / "out")
    assert sum(make_shards(source, tmp_path / "out", overwrite=True).rows.values()) == 21


def test_the_source_is_never_overwritten(write_shards, folder, tmp_path):
    shards = write_shards(40, 30)
    before = contents(shards)
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps([str(folder("a.jpg")), str(shards)]))
    for source in (shards, shards / "train-*.parquet", mixture):
        with pytest.raises(DataError, match="holds the source itself"):
            make_shards(source, shards, overwrite=True)
    assert contents(shards) == before


def test_an_interrupted_run_is_continued(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(200)))

    def interrupt(line: str) -> None:
        if line.startswith("1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "out", shard_mb=0.1, workers=1, report=interrupt)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert kept
    assert not (tmp_path / "out" / "manifest.json").exists()
    made = make_shards(source, tmp_path / "out", shard_mb=0.1)
    assert {name: (made.folder / name).stat().st_mtime_ns for name in kept} == kept
    assert made.digest == make_shards(source, tmp_path / "straight", shard_mb=0.1).digest


def test_a_killed_run_is_continued_to_the_same_files(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(400)))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "pipelines" / "make_shards.py"), str(source), str(out)]
    killed = subprocess.Popen(
        [*command, "--shard-mb", "0.005", "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    while len(list(out.glob("[!.]*.parquet"))) < 5:
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*.parquet")}
    for path in kept:
        pq.read_table(path)  # whole
    made = make_shards(source, out, shard_mb=0.005)
    assert len(list(out.glob("[!.]*.parquet"))) > len(kept) >= 5
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    straight = make_shards(source, tmp_path / "straight", shard_mb=0.005)
    assert made.digest == straight.digest
    assert contents(made.folder) == contents(straight.folder)
    indexes = [name for name in contents(made.folder) if name.endswith(".index")]
    assert len(indexes) == len(list(out.glob("[!.]*.parquet")))


def test_of_two_commands_at_once_the_second_waits_for_the_first(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(200)))
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "pipelines" / "make_shards.py"), str(source), str(out)]
    both = [
        subprocess.Popen(
            [*command, "--shard-mb", "0.005", "--workers", "1", "--overwrite"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sorted("up to date: nothing to do" in text for text in printed) == [False, True]
    second = next(text for text in printed if "nothing to do" in text)
    assert second.count(f"is making {out}: waiting until it is done") <= 1  # 0: it was slower to start than the first
    straight = make_shards(source, tmp_path / "straight", shard_mb=0.005)
    assert contents(out) == contents(straight.folder)


def test_while_another_command_makes_them_it_waits(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(40)))
    (tmp_path / "out").mkdir()
    holder = "import sys, time; from pathlib import Path; from mixmae.lock import take; take(Path(sys.argv[1]));"
    other = subprocess.Popen(
        [sys.executable, "-c", holder + "print(flush=True); time.sleep(3)", str(tmp_path / "out" / ".lock")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    other.stdout.readline()
    lines: list[str] = []
    assert make_shards(source, tmp_path / "out", report=lines.append).made
    assert other.poll() is not None, "it has not waited"
    waited = [line for line in lines if "waiting" in line]
    assert len(waited) == 1
    assert f"(process {other.pid}) is making {tmp_path / 'out'}: waiting until it is done" in waited[0]
    other.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestAnySource:
    def test_tars_with_numbers_for_classes(self, tmp_path, make_jpeg):
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for i in range(60):
                for name, data in ((f"{i}.jpg", make_jpeg(i)), (f"{i}.cls", str(i % 7).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        made = make_shards(tmp_path / "set.tar", tmp_path / "out", tiles=False)
        both = stored(made.folder, "train") | stored(made.folder, "validation")
        assert both == {f"{i}.jpg": (make_jpeg(i), i % 7) for i in range(60)}
        assert made.class_names is None
        assert open_source(made.folder).has_labels

    def test_shards_of_others_are_read_chunk_by_chunk(self, write_shards, tmp_path, monkeypatch):
        source = write_shards(640, 128)
        for sidecar in source.glob("*.index"):
            sidecar.unlink()
        reads = []
        honest = ParquetSource.read
        monkeypatch.setattr(ParquetSource, "read", lambda *args: reads.append(args[1]) or honest(*args))
        made = make_shards(source, tmp_path / "out", shard_mb=0.5, tiles=False)
        assert sum(made.rows.values()) == 768
        chunks, shards = 12, len(list(made.folder.glob("train-*.parquet")))
        # Each chunk for one or two training shards, and once more for those of its rows that are held out.
        assert len(reads) <= 2 * chunks + shards + chunks
        names = list(stored(made.folder, "train"))
        assert names != sorted(names, key=lambda name: int(name.split("/")[1].split(".")[0]))
        assert len({path.split("/")[1] for path in names}) == made.rows["train"]

    def test_several_sources(self, folder, write_shards, tmp_path):
        photos = folder(*(f"{name}/{i}.jpg" for name in ("cat", "yak") for i in range(10)))
        write_shards(20)
        (tmp_path / "mix.json").write_text(json.dumps([str(photos), {"source": "shards", "weight": 2}]))
        made = make_shards(tmp_path / "mix.json", tmp_path / "out")
        assert 52 <= sum(made.rows.values()) <= 60  # the second copies of held-out images are left out
        assert made.class_names == ("cat", "yak", "dog", "emu")

    def test_resized_images(self, folder, tmp_path, make_jpeg):
        png = io.BytesIO()
        Image.new("RGBA", (300, 100)).save(png, "PNG")
        broken = make_jpeg(0, 200, 300)[:500]
        source = folder(
            *(f"{i}.jpg" for i in range(8)),
            **{"large.jpg": make_jpeg(50, 200, 300), "wide.png": png.getvalue(), "broken.jpg": broken},
        )
        made = make_shards(source, tmp_path / "out", resize_longer_side=60, tiles=False)
        both = stored(made.folder, "train") | stored(made.folder, "validation")
        assert both["3.jpg"][0] == (source / "3.jpg").read_bytes()
        assert both["broken.jpg"][0] == broken
        assert image_size(both["wide.png"][0]) == (20, 60)
        small = decode_rgb(both["large.jpg"][0])
        assert small.shape == (40, 60, 3)
        large = Image.open(io.BytesIO(make_jpeg(50, 200, 300)))
        wanted = np.asarray(large.resize((60, 40), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(small - wanted).mean() < 2
        with pytest.raises(DataError, match="resize_longer_side is 0"):
            make_shards(source, tmp_path / "out", resize_longer_side=0)


def test_what_the_manifest_says(folder, tmp_path, make_jpeg):
    grey = io.BytesIO()
    Image.new("RGB", (300, 260), (51, 102, 204)).save(grey, "PNG")
    names = {f"{kind}/{i}.png": grey.getvalue() for kind in ("a", "b") for i in range(10 if kind == "a" else 30)}
    made = make_shards(folder(**names), tmp_path / "out")
    manifest = json.loads((made.folder / "manifest.json").read_text())
    parts = [manifest["splits"][split]["summary"] for split in ("train", "validation")]
    assert sum(part["classes"].get("a", 0) for part in parts) == 10
    assert sum(part["classes"].get("b", 0) for part in parts) == 30
    assert parts[0]["images"] == parts[0]["shorter_side_px"]["256"] == made.rows["train"]
    colours = {"mean": [0.2, 0.4, 0.8], "std": [0.0, 0.0, 0.0]}
    assert parts[0]["pixels"] == {"images": made.rows["train"], "grey": 0, **colours}
    assert parts[0]["smallest_px"] == [300, 260]
    assert manifest["classes"] == ["a", "b"]
    for entry in manifest["splits"]["train"]["files"]:
        assert hashlib.sha256((made.folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]


class TestTiles:
    """With a stand-in for the tool, so that this runs where it is not installed."""

    @pytest.fixture
    def with_tool(self, monkeypatch):
        def retile(data: bytes) -> tuple[bytes, np.ndarray] | None:
            return (data + b"tiles", np.array([20, len(data)], dtype=np.uint32)) if len(data) % 2 else None

        monkeypatch.setattr(tiles, "retile", retile)
        monkeypatch.setattr(tiles, "tool_path", lambda: "/usr/bin/jpegtran")

    @pytest.fixture
    def without_tool(self, monkeypatch):
        monkeypatch.setattr(tiles, "tool_path", lambda: None)

    def test_offsets_travel_with_the_image(self, with_tool, folder, tmp_path):
        source = folder(*(f"{i}.jpg" for i in range(40)))
        lines: list[str] = []
        made = make_shards(source, tmp_path / "out", report=lines.append)
        assert not any("jpegtran" in line for line in lines)
        kinds = set()
        for sample in all_rows(open_source(made.folder)):
            original = (source / sample.path).read_bytes()
            kinds.add(sample.restart_offsets is None)
            if sample.restart_offsets is None:
                assert sample.data == original
            else:
                assert sample.data == original + b"tiles"
                assert sample.restart_offsets.tolist() == [20, len(original)]
        assert kinds == {True, False}
        again = make_shards(made.folder, tmp_path / "again", tiles=False)  # offsets that are there stay
        assert {sample.restart_offsets is None for sample in all_rows(open_source(again.folder))} == kinds
        plain = make_shards(source, tmp_path / "plain", tiles=False)
        assert {sample.restart_offsets is None for sample in all_rows(open_source(plain.folder))} == {True}

    def test_without_the_tool(self, without_tool, folder, tmp_path):
        source = folder(*(f"{i}.jpg" for i in range(10)))
        lines: list[str] = []
        make_shards(source, tmp_path / "out", report=lines.append)
        assert len([line for line in lines if "apt-get install libjpeg-turbo-progs" in line]) == 1
        with pytest.raises(DataError, match="brew install jpeg-turbo"):
            make_shards(source, tmp_path / "other", tiles=True)


def all_rows(source):
    return read_rows(source, range(source.num_rows))


def test_bad_input(folder, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        make_shards(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match="no image in"):
        make_shards(folder("notes.txt"), tmp_path / "out")
    with pytest.raises(DataError, match=r"1 are empty or unreadable, such as a.jpg \(empty\)"):
        make_shards(folder(**{"a.jpg": b""}), tmp_path / "out")
    with pytest.raises(DataError, match=r"only 3 images .* at least 8"):
        make_shards(folder("1.jpg", "2.jpg", "3.jpg"), tmp_path / "out")
    source = folder(*(f"{i}.jpg" for i in range(9)))
    with pytest.raises(DataError, match="shard_mb is 0"):
        make_shards(source, tmp_path / "out", shard_mb=0)
    with pytest.raises(DataError, match="workers is -1"):
        make_shards(source, tmp_path / "out", workers=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write to"):
        make_shards(source, tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot write to s3://bucket/set: the output must be a local folder"):
        make_shards(source, "s3://bucket/set?region=us-east-1")
    with pytest.raises(DataError, match="is a single file that is not Parquet"):
        make_shards(tmp_path / "file", tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read anything")
def test_permissions(folder, tmp_path):
    source = folder(*(f"{i}.jpg" for i in range(20)))
    (source / "3.jpg").chmod(0)
    assert make_shards(source, tmp_path / "out").num_broken == 1
    (source / "3.jpg").chmod(0o600)
    assert make_shards(source, tmp_path / "out", overwrite=True).num_broken == 0
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="cannot write to"):
        make_shards(source, tmp_path / "locked")


def test_is_image_folder(folder, write_shards, tmp_path):
    assert is_image_folder(folder("a.jpg"))
    assert not is_image_folder(write_shards(5))
    assert not is_image_folder(tmp_path / "nowhere")


def test_a_built_in_set_of_another_difficulty(tmp_path):
    easy = make_shards("moths:1", tmp_path / "easy")
    assert easy.digest != make_shards("moths", tmp_path / "moths").digest
    for wrong in ("moths:easy", "moths:1.5"):
        with pytest.raises(DataError, match="from 0 to 1, such as moths:"):
            make_shards(wrong, tmp_path / "wrong")


@pytest.mark.parametrize("name", ["moths", "shapes"])
def test_a_built_in_set(name, tmp_path):
    shards = make_shards(name, tmp_path / name).folder
    train, validation = open_source(shards), open_source(shards, "validation")
    assert (train.num_rows, validation.num_rows) == (4000, 1000)
    assert train.class_names is not None
    assert len(train.class_names) == 20
    table = pq.read_table(validation.files[0])  # type: ignore[attr-defined]
    row = table.slice(17, 1).to_pylist()[0]
    mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
    columns = np.flatnonzero(mask.any(axis=0))
    assert row["box"][::2] == [columns[0], columns[-1] + 1]
    assert row["image"]["path"].startswith(train.class_names[row["label"]])


def test_command_line(folder, tmp_path):
    command = [sys.executable, str(ROOT / "pipelines" / "make_shards.py")]
    options = {"capture_output": True, "text": True, "check": False, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    source = folder(*(f"{i}.jpg" for i in range(20)))
    done = subprocess.run([*command, str(source), str(tmp_path / "out")], **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    assert "15 train + 5 validation images" in done.stdout
    failed = subprocess.run([*command, str(tmp_path / "x"), str(tmp_path / "out")], **options)  # type: ignore[call-overload]
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: the data path")
    assert "Traceback" not in failed.stderr
