"""Random collections with known contents: every reader gives back what is there, or counts what it leaves out.

Damaged bytes never make a reader raise anything but DataError. FUZZ_EXAMPLES=2000 makes more than the usual examples;
`pytest -s` shows at the end how many collections, members and bytes there were.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mixmae.data.account import escaped
from mixmae.data.source import DataError, Source, read_rows
from mixmae.data.sources import list_splits, open_source
from mixmae.data.sources.folders import IMAGE_SUFFIXES
from mixmae.data.sources.storage import suffix_of

pytestmark = pytest.mark.timeout(600)

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
seen: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def statistics() -> Iterator[None]:
    yield
    print("\nfuzzed: " + ", ".join(f"{count} {what}" for what, count in sorted(seen.items())))


NO_ENDS = bytes.maketrans(b"/\0\n\r\t", b"_____")
# Names as cameras, screenshots and people make them, and worse.
words = st.one_of(
    st.sampled_from(["a", "IMG_1", "img.v1.02", "Screenshot 2023-01-05 at 10.11.12", "été", "写真", "x y", "#1"]),
    st.text(
        st.characters(blacklist_categories=("Cs",), blacklist_characters="/\0\n\r\t"), min_size=1, max_size=12
    ).filter(lambda name: name not in (".", "..") and name == name.strip() and len(name.encode()) < 80),
    st.binary(min_size=1, max_size=6).map(lambda raw: os.fsdecode(raw.translate(NO_ENDS))),
).filter(lambda name: name.strip() == name and name not in (".", ".."))  # fmt: skip
suffixes = st.one_of(
    st.sampled_from([".jpg", ".jpg", ".JPEG", ".png", ".Webp", ".tif"]),
    st.sampled_from([".jxl", "", ".jpg_large", ".xml", ".zip"]),
)
image_suffixes = st.sampled_from([".jpg", ".PNG", ".webp"])
folders = st.one_of(
    st.sampled_from(["cat", "dog", "train", "Val", "testing", "images", ".cache", "__MACOSX", "._x", "deep", "été"]),
    words,
)
contents = st.binary(min_size=1, max_size=40)


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def open_all(location: Path) -> dict[str, Source]:
    return {split: open_source(location, split) for split in list_splits(location)}


def left_out(sources: dict[str, Source]) -> int:
    """What the notes count as left out."""
    places = {met.place: met for source in sources.values() for met in source.met}
    return sum(note.count for met in places.values() for note in met.notes if "left out" in note.what)


def rows_of(sources: dict[str, Source]) -> list[tuple[str, bytes, str]]:
    """Path, bytes and class of every row; a class without a name is its number, none is ""."""
    found = []
    for source in sources.values():
        names = source.class_names
        samples = read_rows(source, range(source.num_rows))
        assert [sample.label for sample in samples] == source.read_labels().tolist()
        for sample in samples:
            label = "" if sample.label < 0 else names[sample.label] if names else str(sample.label)
            found.append((sample.path, sample.data, label))
    return found


@fuzz
@given(
    st.dictionaries(
        st.tuples(st.lists(folders, max_size=3).map(tuple), words, suffixes), contents, min_size=1, max_size=25
    )
)
def test_folders(files: dict[tuple[tuple[str, ...], str, str], bytes]) -> None:
    with tempfile.TemporaryDirectory() as base:
        root, written = Path(base) / "set", {}
        root.mkdir()
        for (path, stem, suffix), data in files.items():
            name = "/".join([*path, stem + suffix])
            if suffix_of(name) in (".parquet", ".tar", ".index", ".json", ".txt", ".csv", ".xml"):
                continue
            with suppress(FileExistsError, NotADirectoryError, IsADirectoryError):  # a folder of that name
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(data)
                written[name] = data
        images = {name for name in written if suffix_of(name) in IMAGE_SUFFIXES and not is_hidden(name)}
        hidden_others = {name for name in written if suffix_of(name) not in IMAGE_SUFFIXES and is_hidden(name)}
        if not images:
            with pytest.raises(DataError, match="no image in"):
                open_all(root)
            return
        sources = open_all(root)
        rows = rows_of(sources)
        assert len(rows) == len({path for path, _, _ in rows})  # each once
        by_name = {escaped(name): data for name, data in written.items()}
        assert all(by_name[path] == data for path, data, _ in rows)
        assert {path for path, _, _ in rows} <= {escaped(name) for name in images}
        assert len(rows) + left_out(sources) == len(written) - len(hidden_others)
        for path, _, label in rows:
            assert not label or label in path.split("/")
        seen.update({"folders": 1, "files in folders": len(written), "bytes": sum(map(len, written.values()))})


@fuzz
@given(
    splits=st.sampled_from([("",), ("train", "val"), ("Training", "Testing"), ("train", "valid", "TEST")]),
    classes=st.lists(words.filter(lambda name: not is_hidden(name)), min_size=2, max_size=5, unique_by=escaped),
    names=st.lists(words.filter(lambda name: not is_hidden(name)), min_size=1, max_size=6, unique=True),
    wrapper=st.sampled_from(["", "wrapped/", "a/b/"]),
)
def test_folders_of_classes(splits: tuple[str, ...], classes: list[str], names: list[str], wrapper: str) -> None:
    assume(not any(name.lower() in ("train", "training", "val", "test", "dev", "testing", "eval") for name in classes))
    with tempfile.TemporaryDirectory() as base:
        root, truth = Path(base) / "set", set()
        for split in splits:
            for kind in classes:
                for stem in names:
                    name = wrapper + "/".join(filter(None, [split, kind, stem + ".jpg"]))
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).write_bytes(name.encode(errors="surrogateescape"))
                    truth.add((escaped(name), name.encode(errors="surrogateescape"), escaped(kind)))
        sources = open_all(root)
        assert len(sources) == len(splits)
        assert set(rows_of(sources)) == truth
        assert left_out(sources) == 0
        seen.update({"folders": 1, "files in folders": len(truth), "bytes": sum(len(data) for _, data, _ in truth)})


labels = st.one_of(st.none(), st.integers(0, 5).map(str), st.sampled_from(["cat", "a dog", "été"]))


@fuzz
@given(
    members=st.dictionaries(words, st.tuples(contents, labels, image_suffixes), min_size=1, max_size=20),
    style=st.sampled_from(["cls", "json"]),
    order=st.randoms(use_true_random=False),
    prefix=st.sampled_from(["", "./", "d/e/"]),
)  # fmt: skip
def test_tars(members: dict[str, tuple[bytes, str | None, str]], style: str, order: Any, prefix: str) -> None:
    stored: list[tuple[str, bytes]] = []
    truth, names = {}, any(label and not label.isdecimal() for _, label, _ in members.values())
    for stem, (data, label, suffix) in members.items():
        name = f"{prefix}{stem}{suffix}"
        stored.append((name, data))
        if not is_hidden(name.removeprefix("./")):
            truth[escaped(name)] = (data, label or "")
        if label is not None:
            text = label.encode() if style == "cls" else ('{"label": "' + label + '"}').encode()
            stored.append((f"{prefix}{stem}.{style}", text))
    order.shuffle(stored)
    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "train-0.tar"
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, data in stored:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        if not truth:
            with pytest.raises(DataError, match="holds no image"):
                open_source(path)
            return
        source = open_source(path)
        rows = rows_of({"train": source})
        notes = {note.what: note.count for met in source.met for note in met.notes}
        further = notes.get("further images of a sample are left out", 0)
        assert len(rows) + further == len(truth)
        # Where two names share WebDataset's key, a label of the one may be the other's, too.
        keys = Counter(name.rpartition("/")[2].partition(".")[0] for name in truth)
        for name, data, label in rows:
            assert data == truth[name][0]
            if keys[name.rpartition("/")[2].partition(".")[0]] == 1:
                assert label == truth[name][1]
        if not names:
            assert source.class_names is None
        seen.update({"tars": 1, "members of tars": len(stored), "bytes": path.stat().st_size})


@fuzz
@given(
    rows=st.lists(st.tuples(contents, labels), min_size=1, max_size=30),
    group_rows=st.integers(1, 12),
    as_struct=st.booleans(),
    kind=st.sampled_from(["text", "dictionary", "large"]),
)
def test_parquet(rows: list[tuple[bytes, str | None]], group_rows: int, as_struct: bool, kind: str) -> None:
    column: Any = pa.array([label for _, label in rows], pa.large_string() if kind == "large" else pa.string())
    images = [{"bytes": data, "path": f"{number}.jpg"} if as_struct else data for number, (data, _) in enumerate(rows)]
    table = pa.table({"image": images, "label": column.dictionary_encode() if kind == "dictionary" else column})
    with tempfile.TemporaryDirectory() as base:
        path = Path(base) / "train.parquet"
        pq.write_table(table, path, row_group_size=group_rows)
        found = rows_of({"train": open_source(path)})
        assert [(data, label) for _, data, label in found] == [(data, label or "") for data, label in rows]
        seen.update({"Parquet files": 1, "rows of Parquet": len(rows), "bytes": path.stat().st_size})


@fuzz
@given(
    entries=st.dictionaries(
        words.map(lambda name: name + ".jpg"), st.tuples(contents, labels), min_size=1, max_size=15
    ),
    ending=st.sampled_from([b"\n", b"\r\n"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_lists(entries: dict[str, tuple[bytes, str | None]], ending: bytes, mark: bytes) -> None:
    entries = {name: entry for name, entry in entries.items() if not name.startswith(("#", "~"))}
    assume(entries)
    with tempfile.TemporaryDirectory() as base:
        lines = []
        for name, (data, label) in entries.items():
            (Path(base) / name).write_bytes(data)
            lines.append(os.fsencode(name) + (b"\t" + label.encode() if label else b""))
        (Path(base) / "list.txt").write_bytes(mark + ending.join(lines) + ending)
        found = rows_of({"train": open_source(Path(base) / "list.txt")})
        assert found == [(escaped(name), data, label or "") for name, (data, label) in entries.items()]
        seen.update({"lists": 1, "lines of lists": len(lines), "bytes": sum(len(data) for data, _ in entries.values())})


def whole_files() -> dict[str, bytes]:
    """A tar, a Parquet file and a list, in bytes."""
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as stream:
        for number in range(6):
            for name, data in ((f"{'n' * 120}é{number}.jpg", bytes([number]) * 300), (f"{number}.cls", b"%d" % number)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                stream.addfile(entry, io.BytesIO(data))
    images = [{"bytes": bytes([number]) * 100, "path": f"{number}.jpg"} for number in range(20)]
    pq.write_table(pa.table({"image": images, "label": ["cat", "dog"] * 10}), table, row_group_size=7)
    return {"train.tar": tar.getvalue(), "train.parquet": table.getvalue(), "train.txt": b"a.jpg\tcat\nb.jpg\tdog\n"}


WHOLE = whole_files()


@fuzz
@given(
    name=st.sampled_from(sorted(WHOLE)),
    changes=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=12)), min_size=1, max_size=8),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_damaged_bytes(name: str, changes: list[tuple[float, bytes]], kept: float) -> None:
    data = bytearray(WHOLE[name])
    for where, new in changes:
        at = int(where * (len(data) - 1))
        data[at : at + len(new)] = new
    with tempfile.TemporaryDirectory() as base:
        for image in ("a.jpg", "b.jpg"):
            (Path(base) / image).write_bytes(b"x")
        path = Path(base) / name
        path.write_bytes(data[: int(kept * len(data))])
        with suppress(DataError):
            source = open_source(path)
            assert source.digest
            read_rows(source, range(source.num_rows))
            source.read_labels()
        seen.update({"damaged files": 1})
