"""Several sources as one: how often rows come, and what their classes are."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from mixmae.data.order import Plan
from mixmae.data.shards.pack import make_shards
from mixmae.data.source import DataError
from mixmae.data.sources import open_source, open_train_and_held_out
from tests.factories import all_samples


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.25, 2), (2.5, 0.1), (1.4, 1)])
def test_each_row_comes_floor_or_ceil_of_its_weight(write_files, write_shards, weights):
    places = [write_files(*(f"{i}.jpg" for i in range(100))), write_shards(90, 41)]
    joined = open_source(list(zip(places, weights, strict=True)))
    counts = Counter(sample.where for sample in all_samples(joined))
    assert sum(counts.values()) == joined.num_rows == joined.chunk_sizes.sum()
    for place, weight, size in zip(places, weights, (100, 131), strict=True):
        times = [counts[sample.where] for sample in all_samples(open_source(place))]
        assert min(times) >= np.floor(weight)
        assert max(times) <= np.ceil(weight)
        assert sum(times) == round(weight * size)
    plan = Plan(chunk_sizes=joined.chunk_sizes, seed=1, window_rows=64)
    assert sorted(plan.rows_at(0, joined.num_rows)[0]) == list(range(joined.num_rows))


@pytest.mark.parametrize("weights", [(2, 1), (0.5, 12.25), (1, 1)])
def test_no_copy_of_a_held_out_image_is_trained_on(write_files, tmp_path, weights):
    places = [write_files(*(f"{i}.jpg" for i in range(count)), below=name) for name, count in (("a", 100), ("b", 40))]
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


def test_classes_are_joined_by_name(write_files, write_shards):
    photos = write_files("dog/1.jpg", "newt/2.jpg")
    joined = open_source([write_shards(5), photos])  # cat, dog, emu
    assert joined.class_names == ("cat", "dog", "emu", "newt")
    assert [sample.label for sample in all_samples(joined)] == [0, 1, 2, 0, 1, 1, 3]
    flat = write_files("x.jpg", below="flat")
    with_unlabelled = open_source([flat, photos])
    assert with_unlabelled.class_names == ("dog", "newt")
    assert [sample.label for sample in all_samples(with_unlabelled)] == [-1, 0, 1]


def test_classes_have_the_same_numbers_in_all_splits(write_files):
    first = write_files("train/dog/1.jpg", "train/newt/2.jpg", below="first")
    second = write_files("train/ant/1.jpg", "train/cat/2.jpg", "val/ant/3.jpg", "val/cat/4.jpg", below="second")
    assert open_source([first, second]).class_names == ("dog", "newt", "ant", "cat")
    held_out = open_source([first, second], "validation")
    assert held_out.class_names == ("dog", "newt", "ant", "cat")
    assert [sample.label for sample in all_samples(held_out)] == [2, 3]
    assert held_out.where(1).endswith("val/cat/4.jpg")


def test_numbers_beside_names_are_no_classes(write_files, tmp_path):
    photos = write_files("dog/1.jpg", "newt/2.jpg")
    (tmp_path / "list.txt").write_text("photos/dog/1.jpg\t1\n")
    joined = open_source([photos, tmp_path / "list.txt"])
    assert joined.class_names is None
    assert not joined.has_labels
    assert {sample.label for sample in all_samples(joined)} == {-1}
    (tmp_path / "photos").rename(tmp_path / "train_photos")
    held_out = write_files("train/dog/1.jpg", "train/newt/2.jpg", "val/dog/1.jpg", "val/newt/3.jpg")
    (tmp_path / "list.txt").write_text("photos/train/dog/1.jpg\t1\n")
    assert not open_source([held_out, tmp_path / "list.txt"], "validation").has_labels


def test_bad_weights(write_files):
    folder = write_files("1.jpg")
    for weight in (0, -1, float("nan")):
        with pytest.raises(DataError, match="give a number above 0"):
            open_source([(folder, weight)])
    with pytest.raises(DataError, match="has no rows: the weights are too small"):
        open_source([(folder, 0.1)])
    with pytest.raises(DataError, match="list of data sources is empty"):
        open_source([])
