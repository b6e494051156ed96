"""Whole images with their maps, and images and maps in blocks: what is made, and what is broken."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixmae.data.blocks import Block, BrokenRecord, load_block, local_batches
from mixmae.data.images.segment_augment import SegmentAugmentConfig
from mixmae.data.order import Plan
from mixmae.data.pairs import Pair, check_maps, read_pairs
from mixmae.data.source import DataError
from mixmae.data.sources import open_source
from mixmae.data.streams import _pack, _unpack
from mixmae.data.truth import IGNORE, DenseSource, with_maps
from mixmae.share import WorkerShare
from mixmae.training.loop import LoopConfig

AUGMENT = SegmentAugmentConfig(image_size=32, shorter_px=32, longer_px=64, scale=(0.8, 1.2))


@pytest.fixture
def masked(tmp_path) -> DenseSource:
    """20 images whose grey tells the class; number 3 is no image, number 7 has a class too many, 9 is all ignored."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    for number in range(20):
        indices = (np.add.outer(np.arange(40), np.arange(50)) // (7 + number) % 3).astype(np.uint8)
        Image.fromarray(80 * indices).save(tmp_path / f"images/{number:02d}.png")
        indices = indices + 5 * (number == 7) if number != 9 else np.full_like(indices, IGNORE)
        Image.fromarray(indices.astype(np.uint8)).save(tmp_path / f"masks/{number:02d}.png")
    (tmp_path / "images/03.png").write_bytes(b"no image")
    return with_maps(open_source(str(tmp_path)))


def test_pairs_are_as_they_are_stored(masked):
    with ThreadPoolExecutor(2) as pool:
        batches = list(read_pairs(masked, np.arange(20), channels=3, batch_size=8, pool=pool))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    found = [item for batch in batches for item in batch]
    assert [item.row for item in found if isinstance(item, BrokenRecord)] == [3, 7]
    assert "cannot identify" in found[3].reason or "not an image" in found[3].reason
    assert "its mask has the values 5, 6, 7" in found[7].reason
    assert "masks/07.png" in found[7].reason
    for pair in (item for item in found if isinstance(item, Pair)):
        if pair.row != 9:
            assert (pair.pixels[..., 0] == 80 * pair.indices).all()


def test_a_set_is_looked_at_before_a_run(masked, tmp_path):
    check_maps(masked, LoopConfig().is_hopeless)
    with pytest.raises(DataError, match=r"2 of 20 images .* cannot be used, for example .*03.png"):
        check_maps(masked, lambda broken, seen: broken >= 2)


def test_a_set_without_a_class(masked, tmp_path):
    for path in (tmp_path / "masks").glob("*.png"):
        Image.fromarray(np.full((40, 50), IGNORE, dtype=np.uint8)).save(path)
    with pytest.raises(DataError, match="no pixel of the 20 masks"):
        check_maps(masked, LoopConfig(max_broken_fraction=1.0).is_hopeless)


def test_a_block_has_a_target_for_each_image(masked):
    rows, epochs = np.array([0, 9, 12]), np.zeros(3, dtype=np.int64)
    block = load_block(masked, AUGMENT, rows, epochs, seed=5)
    targets = np.stack(block.targets).reshape(3, 32, 32)
    assert (targets[1] == IGNORE).all()
    shown = targets[[0, 2]] != IGNORE
    # Colours are distorted, but darker classes stay darker.
    for image, target, seen in zip(block.images[[0, 2]], targets[[0, 2]], shown, strict=True):
        means = [image[0][seen & (target == index)].mean() for index in range(3)]
        assert means == sorted(means)
    alone = load_block(masked, AUGMENT, rows[2:], epochs[2:], seed=5)
    assert (alone.targets[0] == block.targets[2]).all()
    assert (alone.images[0] == block.images[2]).all()
    assert (load_block(masked, AUGMENT, rows[2:], epochs[2:] + 1, seed=5).images[0] != block.images[2]).any()


def test_what_is_broken_is_replaced_with_its_mask(masked):
    """Neither a broken image nor a broken mask is shown: the next one is, cropped with the broken row's own draw."""
    block = load_block(masked, AUGMENT, np.array([2, 3, 7]), np.zeros(3, dtype=np.int64), seed=0)
    assert sorted(record.row for record in block.broken.values()) == [3, 7]
    assert "5, 6, 7" in block.broken[2].reason
    assert [set(np.unique(target)) <= {0, 1, 2, IGNORE} for target in block.targets] == [True] * 3
    assert all((target != IGNORE).any() for target in block.targets)


def test_targets_come_through_the_object_store_and_its_parts(masked):
    block = load_block(masked, AUGMENT, np.arange(4), np.zeros(4, dtype=np.int64), seed=1)
    uneven = Block(*[getattr(block, name) for name in ("images", "rows", "labels", "epochs", "broken")],
                   targets=tuple(target[: 5 * number] for number, target in enumerate(block.targets)))  # fmt: skip
    for given in (block, uneven):
        _, copy = _unpack(_pack(0, given))
        assert [target.tolist() for target in copy.targets] == [target.tolist() for target in given.targets]
        parts = [given.part(0, 1), given.part(1, 4)]
        assert [t.tolist() for t in Block.join(parts).targets] == [t.tolist() for t in given.targets]


def test_workers_see_what_one_would(masked):
    plan = Plan(chunk_sizes=masked.chunk_sizes, seed=3)

    def rows_and_targets(num_workers: int) -> list:
        seen = []
        for step in range(3):
            for rank in range(num_workers):
                share = WorkerShare(batch_size=4, rank=rank, num_workers=num_workers)
                for batch in local_batches(masked, plan, AUGMENT, share=share, start_step=step, stop_step=step + 1):
                    seen += [(int(row), target.tolist()) for row, target in zip(batch.rows, batch.targets, strict=True)]
        return seen

    assert rows_and_targets(1) == rows_and_targets(2)


def test_other_tasks_have_no_targets(tmp_path: Path, shards):
    from mixmae.data.images.augment import AugmentConfig

    block = load_block(
        open_source(shards("set", [0, 1])), AugmentConfig(image_size=16), np.arange(2), np.zeros(2, np.int64), seed=0
    )
    assert block.targets == ()
    assert _unpack(_pack(0, block))[1].targets == ()
