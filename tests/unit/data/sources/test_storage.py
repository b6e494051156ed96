"""s3:// through a real S3 server on loopback (moto's); the requests go through pyarrow's own client."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow.fs import GcsFileSystem

from mixmae.data.blocks import load_block
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError, read_rows
from mixmae.data.sources import layout_of, list_splits, open_source
from mixmae.data.sources.storage import locate
from tests.factories import write_tar

pytestmark = pytest.mark.timeout(120)


class Store:
    """A bucket of the server, filled from local files."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
        self._client.create_bucket(Bucket="images")

    def put(self, prefix: str, folder: Path) -> str:
        """Upload a folder; returns its URI."""
        for path in folder.rglob("*"):
            if path.is_file():
                self._client.upload_file(str(path), "images", f"{prefix}/{path.relative_to(folder)}")
        return self.uri(prefix)

    def uri(self, path: str) -> str:
        return f"s3://images/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        yield Store(":".join(map(str, server.get_host_and_port())))
        server.stop()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def same(source, other) -> bool:
    one, two = (read_rows(each, range(each.num_rows)) for each in (source, other))
    return [(sample.data, sample.label) for sample in one] == [(sample.data, sample.label) for sample in two]


@pytest.mark.parametrize("with_sidecars", [True, False])
def test_shards(store, write_shards, with_sidecars):
    folder = write_shards(150, 30)
    write_shards(9, split="validation")
    if not with_sidecars:
        for sidecar in folder.glob("*.index"):
            sidecar.unlink()
    uri = store.put(f"sets/shards-{with_sidecars}", folder)
    source = pickle.loads(pickle.dumps(open_source(uri)))
    assert source.exact_reads == with_sidecars
    assert same(source, open_source(folder))
    assert source.class_names == ("cat", "dog", "emu")
    assert source.where(155).startswith(f"s3://images/sets/shards-{with_sidecars}/train-00001-of-00002.parquet#5")
    assert "testing" not in source.where(155)
    assert list_splits(uri) == ("train", "validation")
    assert open_source(store.uri(f"sets/shards-{with_sidecars}/train-*.parquet")).num_rows == 180


def test_single_images_are_fetched_by_ranges(store, tmp_path, monkeypatch):
    from mixmae.data.shards.write import StoredImage, shard_name, shard_schema, write_shard
    from mixmae.data.sources import storage

    images = [StoredImage(np.random.default_rng(row).bytes(400_000), f"{row}.jpg") for row in range(20)]
    (tmp_path / "big").mkdir()
    write_shard(tmp_path / "big" / shard_name("train", 0, 1), images, shard_schema(None))
    source = open_source(store.put("big", tmp_path / "big"))
    asked = []
    honest = storage._remote_handle

    class Counting:
        def __init__(self, handle):
            self._handle = handle

        def read_at(self, count, offset):
            asked.append(count)
            return self._handle.read_at(count, offset)

    monkeypatch.setattr(storage, "_remote_handle", lambda *key: Counting(honest(*key)))
    samples = source.read(0, [17, 2, 3, 9])
    assert [sample.data for sample in samples] == [images[row].data for row in (17, 2, 3, 9)]
    assert len(asked) == 3  # 2 and 3 come together
    assert sum(asked) < 1_700_000


def test_folders_lists_and_tars(store, tmp_path, make_jpeg):
    photos = tmp_path / "photos"
    for number in range(70):
        path = photos / ("cat" if number % 2 else "dog") / f"{number} 100%.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_jpeg(number) if number else b"")
    uri = store.put("photos", photos)
    source = pickle.loads(pickle.dumps(open_source(uri)))
    assert layout_of(uri) == "files"
    assert source.class_names == ("cat", "dog")
    assert same(source, open_source(photos))
    assert open_source(store.uri("photos/*/1*.jpg")).num_rows == open_source(f"{photos}/*/1*.jpg").num_rows
    block = load_block(source, AugmentConfig(image_size=16), np.arange(70), np.zeros(70, dtype=np.int64), seed=0)
    assert [record.where for record in block.broken.values()] == ["s3://images/photos/dog/0 100%.jpg"]

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "some.txt").write_text("cat/1 100%.jpg\tcat\n")
    store.put("photos", lists)
    listed = open_source(store.uri("photos/some.txt"))
    assert [(sample.data, sample.label) for sample in read_rows(listed, [0])] == [(make_jpeg(1), 0)]

    tars = tmp_path / "tars"
    members = [((f"{i}.jpg", make_jpeg(i)), (f"{i}.cls", str(i).encode())) for i in range(30)]
    write_tar(tars / "a.tar", [member for pair in members for member in pair])
    uri = store.put("tars", tars)
    for _ in range(2):  # the second time from the index in the cache
        assert same(open_source(uri), open_source(tars))
    assert list((tmp_path / "cache" / "mixmae" / "tars").glob("*.index"))


def test_make_shards_from_a_store(store, write_shards, tmp_path):
    uri = store.put("raw", write_shards(40))
    made = make_shards(uri, tmp_path / "out", report=lambda line: None)
    assert sum(made.rows.values()) == 40
    assert made.class_names == ("cat", "dog", "emu")
    assert "endpoint" not in (made.folder / "manifest.json").read_text()


def test_google_storage_that_does_not_answer_is_given_up():
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        where = f"endpoint_override=127.0.0.1:{closed.getsockname()[1]}&scheme=http"
        start = time.monotonic()
        with pytest.raises(DataError, match=r"^gs://images/set cannot be read .*: check the address, the credentials"):
            open_source(f"gs://anonymous@images/set?{where}&retry_limit_seconds=1")
        assert time.monotonic() - start < 15
    storage, path = locate("gs://anonymous@images/a%20set")
    assert path == "images/a set"
    assert isinstance(storage.filesystem, GcsFileSystem)
    assert storage.filesystem.__reduce__()[1][0]["retry_time_limit"] == timedelta(seconds=20)  # 15 minutes by default


def test_what_is_not_there(store):
    for uri in (store.uri("nothing"), store.uri("").replace("images", "no-such-bucket")):
        with pytest.raises(DataError, match=r"s3://.* does not exist: check the spelling, the credentials"):
            open_source(uri)
    with pytest.raises(DataError, match=r"nothing matches s3://images/none/\*\.tar"):
        open_source(store.uri("none/*.tar"))
