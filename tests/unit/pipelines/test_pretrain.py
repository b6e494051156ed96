"""What a user can get wrong on the command line: one sentence, before the run starts, and no stack trace."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixmae.jobs.config import to_json
from pipelines.pretrain import main
from pipelines.recipes import PRETRAIN_RECIPES


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    def test_unknown_recipe_offers_the_nearest(self, error):
        text = error(main, "mixmae_swin_bas_600ep", code=2)
        assert "mixmae_swin_base_600ep" in text

    def test_unknown_field_offers_the_nearest(self, error):
        text = error(main, "demo", "--loop.batchsize", "8", code=2)
        assert "--loop.batch-size" in text

    def test_impossible_field_value(self, error):
        text = error(main, "demo", "--method.num-images", "7", code=2)
        assert "--method.num-images" in text
        assert "2, 3, 4 or 5" in text

    def test_missing_data(self, error, tmp_path):
        assert "does not exist" in error(main, "demo", "--data", tmp_path / "no", "--output", tmp_path / "out")

    def test_folder_without_images(self, error, tmp_path):
        (tmp_path / "empty").mkdir()
        text = error(main, "demo", "--data", tmp_path / "empty", "--output", tmp_path / "out")
        assert "no image" in text

    def test_shard_without_an_image_column(self, error, tmp_path):
        (tmp_path / "shards").mkdir()
        pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "shards" / "train-0.parquet")
        text = error(main, "demo", "--data", tmp_path / "shards", "--output", tmp_path / "out")
        assert "no image column" in text
        assert "number" in text

    def test_truncated_parquet_is_named(self, error, tmp_path, photos):
        from mixmae.data.shards.pack import make_shards

        shards = make_shards(photos, tmp_path / "shards", report=lambda _: None).folder
        victim = next(shards.glob("train-*.parquet"))
        victim.write_bytes(victim.read_bytes()[:-100])
        text = error(main, "demo", "--data", shards, "--output", tmp_path / "out")
        assert victim.name in text

    def test_batch_not_divisible_by_the_images_of_a_mix(self, error):
        text = error(main, "demo", "--method.num-images", "4", "--loop.batch-size", "66", code=2)
        assert "mixed 4 at a time" in text
        text = error(main, "demo", "--method.num-images", "2", "--loop.batch-size", "33", code=2)
        assert "mixed 2 at a time" in text

    def test_more_workers_than_parts_of_a_batch(self, error, tmp_path):
        flags = ("--method.num-images", "4", "--loop.batch-size", "32", "--output", tmp_path / "out")
        for workers in ("9", "9:12"):
            text = error(main, "demo", "--workers", workers, *flags)
            assert "A batch of 32 images, 8 times 4 that stay together, cannot be shared by 9 workers" in text
            assert "lower --workers to 8 or less" in text

    def test_micro_batch_not_divisible_by_the_images_of_a_mix(self, error, tmp_path):
        flags = ("--method.num-images", "2", "--loop.batch-size", "6", "--loop.micro-batch-size", "3")
        text = error(main, "demo", *flags, "--output", tmp_path / "out")
        assert "A micro-batch of 3 images cannot be cut into parts of 2" in text

    @pytest.mark.parametrize("given", ["8:2", "0:4", "a:b", "2:", ":2", "2:3:4", "two", "-1"])
    def test_workers_that_are_no_numbers(self, error, given):
        text = error(main, "demo", f"--workers={given}", code=2)
        assert f"--workers is {given}: " in text

    def test_image_size_not_a_multiple_of_the_cells(self, error):
        assert "multiple of 16" in error(main, "demo", "--augment.image-size", "100", code=2)

    def test_set_smaller_than_a_batch(self, error, tmp_path, photos):
        text = error(main, "demo", "--data", photos, "--output", tmp_path / "out", "--loop.batch-size", "64")
        assert "a batch needs" in text

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_output_without_permission(self, error, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written" in error(main, "demo", "--output", tmp_path / "locked" / "run")

    def test_output_below_a_file(self, error, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in error(main, "demo", "--output", tmp_path / "file" / "run")

    def test_output_of_something_else(self, error, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        assert "not a run of this program" in error(main, "demo", "--output", tmp_path)

    def test_resume_without_a_run(self, error, tmp_path):
        assert "no run to resume" in error(main, "demo", "--output", tmp_path / "new", "--resume")

    def test_resume_with_another_model(self, error, tmp_path, photos):
        config = to_json(PRETRAIN_RECIPES["demo"]())
        (tmp_path / "run").mkdir()
        begun = {"status": "running", "recipe": "demo", "config": config}
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        arguments = ("demo", "--data", photos, "--output", tmp_path / "run", "--encoder.embed-dim", "64")
        text = error(main, *arguments, "--loop.batch-size", "16")
        assert f"encoder.embed_dim was {config['encoder']['embed_dim']} and is 64" in text

    def test_a_run_that_never_began_does_not_bind_the_next_one(self, error, tmp_path):
        arguments = ("demo", "--output", tmp_path / "run", "--data", tmp_path / "no")
        assert "does not exist" in error(main, *arguments)
        assert "does not exist" in error(main, *arguments, "--encoder.embed-dim", "64")
        assert "no run to resume" in error(main, *arguments, "--resume")

    def test_relative_mlflow_store(self, error, tmp_path):
        text = error(main, "demo", "--output", tmp_path / "run", "--mlflow-uri", "./mlruns")
        assert "sqlite:////ABSOLUTE" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--workers", "-1"), "--workers is -1: it must be at least 1"),
        (("--output", "file:///bucket/run"), "without file://"),
    ],
)
def test_flags_that_cannot_be(error, flags, sentence):
    text = error(main, "demo", *flags, code=2)
    assert sentence in text


def test_a_damaged_run_file_is_named(error, tmp_path):
    (tmp_path / "run.json").write_text('{"status": ')
    text = error(main, "demo", "--output", tmp_path)
    assert f"{tmp_path / 'run.json'} is damaged" in text


def test_help_of_the_program_and_of_a_recipe(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRETRAIN_RECIPES)
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--data", "--output", "--workers", "--resume", "--loop.batch-size", "--optim.base-lr"):
        assert flag in text
