"""The pure function from rows to images, and the whole data plane without Ray."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mixmae.data.blocks import eval_batch, eval_batches, load_block, local_batches
from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.decode import MAX_PIXELS
from mixmae.data.order import Plan
from mixmae.data.sources import open_source
from mixmae.data.sources.parquet import ParquetSource
from mixmae.share import WorkerShare
from tests.factories import write_tar

AUGMENT = AugmentConfig(image_size=(32, 48))


def rows_and_epochs(*rows: int, epoch: int = 0):
    return np.array(rows), np.full(len(rows), epoch)


def test_a_block_is_made_of_its_rows_alone(write_shards):
    source = open_source(write_shards(100))
    block = load_block(source, AUGMENT, *rows_and_epochs(3, 99, 64, 3), seed=5)
    assert block.images.shape == (4, 3, 32, 48)
    assert block.images.flags["C_CONTIGUOUS"]
    assert block.labels.tolist() == [0, 0, 1, 0]
    assert np.array_equal(block.images[0], block.images[3])
    alone = load_block(source, AUGMENT, *rows_and_epochs(64), seed=5)
    assert np.array_equal(alone.images[0], block.images[2])
    for other in (
        load_block(source, AUGMENT, *rows_and_epochs(64, epoch=1), seed=5),
        load_block(source, AUGMENT, *rows_and_epochs(64), seed=6),
    ):
        assert not np.array_equal(other.images[0], block.images[2])


def test_a_broken_image_is_replaced_by_the_next_of_its_chunk(write_shards, make_jpeg):
    damaged = {10: b"", 11: b"garbage", 63: make_jpeg(63)[:300]}
    source = open_source(write_shards(100, damaged=damaged))
    block = load_block(source, AUGMENT, *rows_and_epochs(9, 10, 63, 70), seed=0)
    assert sorted(block.broken) == [1, 2]
    assert [block.broken[place].row for place in (1, 2)] == [10, 63]
    assert block.broken[1].where.endswith("train-00000-of-00001.parquet#10 / photos/10.jpg")
    assert block.broken[1].reason == "the file is empty"
    assert block.rows.tolist() == [9, 10, 63, 70]
    assert block.labels.tolist() == [0, 12 % 3, 0, 1]  # rows 12 and 0 are shown

    mended = open_source(write_shards(100, damaged={10: make_jpeg(12), 63: make_jpeg(0)}))
    expected = load_block(mended, AUGMENT, *rows_and_epochs(9, 10, 63, 70), seed=0)
    assert np.array_equal(block.images, expected.images)


def test_a_chunk_without_any_good_image_is_grey(write_shards):
    source = open_source(write_shards(5, damaged=dict.fromkeys(range(5), b"x")))
    block = load_block(source, AUGMENT, *rows_and_epochs(0, 4), seed=0)
    assert (block.images == 128).all()
    assert block.labels.tolist() == [-1, -1]
    assert len(block.broken) == 2


def test_a_large_chunk_of_nonsense_does_not_cost_minutes(tmp_path, make_jpeg, monkeypatch):
    """Row groups of others may have thousands of rows: after a share of them nobody tries on."""
    table = pa.table({"image": [b"x"] * 500 + [make_jpeg(0)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=1000)
    source = open_source(tmp_path)
    tried = []
    honest = ParquetSource.read
    monkeypatch.setattr(ParquetSource, "read", lambda *key: tried.append(key[2]) or honest(*key))
    block = load_block(source, AUGMENT, *rows_and_epochs(0, 480), seed=0)
    assert (block.images[0] == 128).all()
    assert block.images[1].std() > 0
    assert len(tried) < 100


@pytest.mark.parametrize("num_workers", [2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_workers_together_see_what_one_would(write_shards, num_workers, micro_batch_size):
    source = open_source(write_shards(50, 20))
    plan = Plan(chunk_sizes=source.chunk_sizes, seed=3, window_rows=32)
    stop_step = 9  # crosses an epoch
    whole = local_batches(source, plan, AUGMENT, share=WorkerShare(batch_size=12), stop_step=stop_step)
    alone = torch.cat([batch.images for batch in whole])
    together = []
    for rank in range(num_workers):
        share = WorkerShare(
            batch_size=12, block=2, micro_batch_size=micro_batch_size, rank=rank, num_workers=num_workers
        )
        batches = list(local_batches(source, plan, AUGMENT, share=share, stop_step=stop_step))
        assert [len(batch.images) for batch in batches] == stop_step * list(share.micro_batches)
        together.append(torch.cat([batch.images for batch in batches]).unflatten(0, (stop_step, share.images)))
    assert torch.equal(torch.cat(together, dim=1).flatten(0, 1), alone)


def test_accumulation_and_resume_change_nothing(write_shards):
    source = open_source(write_shards(50, 20))
    plan = Plan(chunk_sizes=source.chunk_sizes, seed=3)
    fours, eights = (WorkerShare(batch_size=16, micro_batch_size=size) for size in (4, 8))
    whole = list(local_batches(source, plan, AUGMENT, share=fours, stop_step=6))
    assert len(whole) == 24
    resumed = list(local_batches(source, plan, AUGMENT, share=eights, start_step=4, stop_step=6))
    assert torch.equal(torch.cat([b.images for b in whole[16:]]), torch.cat([b.images for b in resumed]))
    assert torch.cat([b.rows for b in whole]).tolist() == plan.rows_at(0, 96)[0].tolist()
    assert torch.cat([b.epochs for b in whole]).tolist() == plan.rows_at(0, 96)[1].tolist()


def test_eval_batch(write_shards):
    source = open_source(write_shards(10, damaged={3: b"x"}))
    images = eval_batch(source, range(10), 32)
    assert images.shape == (9, 3, 32, 32)  # without the broken one
    assert images.dtype == torch.uint8
    assert torch.equal(eval_batch(source, [7], (32, 32))[0], images[6])
    assert eval_batch(source, [3], 32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("threads", [0, 3])
def test_eval_batches_are_all_rows_that_decode_with_their_labels(write_shards, threads):
    source = open_source(write_shards(70, 10, damaged={3: b"x", 71: b""}))
    pool = ThreadPoolExecutor(threads) if threads else None
    batches = list(eval_batches(source, 32, batch_size=32, pool=pool))
    assert [len(batch.images) for batch in batches] == [31, 32, 15]
    rows = torch.tensor([row for row in range(80) if row not in (3, 71)])
    assert torch.equal(torch.cat([batch.rows for batch in batches]), rows)
    assert torch.equal(torch.cat([batch.images for batch in batches]), eval_batch(source, range(80), 32))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), rows % 3)
    assert [[record.row for record in batch.broken] for batch in batches] == [[3], [], [71]]

    (some,) = eval_batches(source, 32, batch_size=32, rows=np.array([75, 2, 69]))
    assert some.labels.tolist() == [0, 2, 0]
    assert torch.equal(some.images, eval_batch(source, [75, 2, 69], 32))


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
def test_half_a_percent_of_broken_files_gives_a_complete_ledger(tmp_path, make_jpeg, layout, write_shards):
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
        place = write_tar(tmp_path / "all.tar", named)
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
