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
