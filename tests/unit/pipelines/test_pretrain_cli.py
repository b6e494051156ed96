"""What a user can get wrong on the command line: one sentence, before time is lost, and no stack trace."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mixmae.jobs.config import differences, to_json
from pipelines import runs as module
from pipelines.pretrain import main
from pipelines.recipes import PRETRAIN_RECIPES


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Any attempt to start Ray or MLflow fails the test: these errors must come first."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached the cluster")

    monkeypatch.chdir(tmp_path)  # the default output is below the working directory
    monkeypatch.setattr(module, "connect", refuse)
    monkeypatch.setattr(module, "create_run", refuse)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


def _error(capsys, *argv: object, code: int = 1) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    assert stop.value.code == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    def test_unknown_recipe_offers_the_nearest(self, capsys):
        text = _error(capsys, "mixmae_swin_bas_600ep", code=2)
        assert "mixmae_swin_base_600ep" in text

    def test_unknown_field_offers_the_nearest(self, capsys):
        text = _error(capsys, "demo", "--loop.batchsize", "8", code=2)
        assert "--loop.batch-size" in text

    def test_impossible_field_value(self, capsys):
        text = _error(capsys, "demo", "--method.num-images", "7", code=2)
        assert "num_images" in text
        assert "2, 3, 4 or 5" in text

    def test_missing_data(self, capsys, tmp_path):
        assert "does not exist" in _error(capsys, "demo", "--data", tmp_path / "no", "--output", tmp_path / "out")

    def test_folder_without_images(self, capsys, tmp_path):
        (tmp_path / "empty").mkdir()
        text = _error(capsys, "demo", "--data", tmp_path / "empty", "--output", tmp_path / "out")
        assert "no image" in text

    def test_shard_without_an_image_column(self, capsys, tmp_path):
        (tmp_path / "shards").mkdir()
        pq.write_table(pa.table({"text": ["a"], "number": [1]}), tmp_path / "shards" / "train-0.parquet")
        text = _error(capsys, "demo", "--data", tmp_path / "shards", "--output", tmp_path / "out")
        assert "no image column" in text
        assert "number" in text

    def test_truncated_parquet_is_named(self, capsys, tmp_path, photos):
        from mixmae.data.shards.pack import make_shards

        shards = make_shards(photos, tmp_path / "shards", report=lambda _: None).folder
        victim = next(shards.glob("train-*.parquet"))
        victim.write_bytes(victim.read_bytes()[:-100])
        text = _error(capsys, "demo", "--data", shards, "--output", tmp_path / "out")
        assert victim.name in text

    def test_batch_not_divisible_by_the_images_of_a_mix(self, capsys):
        text = _error(capsys, "demo", "--method.num-images", "4", "--loop.batch-size", "66", code=2)
        assert "mixed 4 at a time" in text
        text = _error(capsys, "demo", "--method.num-images", "2", "--loop.batch-size", "33", code=2)
        assert "mixed 2 at a time" in text

    def test_batch_not_divisible_by_the_workers(self, capsys, tmp_path):
        text = _error(capsys, "demo", "--workers", "3", "--output", tmp_path / "out")
        assert "shared equally by 3 workers" in text

    def test_micro_batch_not_divisible_by_the_images_of_a_mix(self, capsys, tmp_path):
        text = _error(capsys, "demo", "--loop.batch-size", "6", "--workers", "2", "--output", tmp_path / "out")
        assert "3 images at once" in text

    def test_image_size_not_a_multiple_of_32(self, capsys):
        assert "multiple of 32" in _error(capsys, "demo", "--augment.image-size", "100", code=2)

    def test_set_smaller_than_a_batch(self, capsys, tmp_path, photos):
        text = _error(capsys, "demo", "--data", photos, "--output", tmp_path / "out", "--loop.batch-size", "64")
        assert "a batch needs" in text

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_output_without_permission(self, capsys, tmp_path):
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written" in _error(capsys, "demo", "--output", tmp_path / "locked" / "run")

    def test_output_below_a_file(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot be written" in _error(capsys, "demo", "--output", tmp_path / "file" / "run")

    def test_output_of_something_else(self, capsys, tmp_path):
        (tmp_path / "thesis.tex").write_text("")
        assert "not a run of this program" in _error(capsys, "demo", "--output", tmp_path)

    def test_resume_without_a_run(self, capsys, tmp_path):
        assert "no run to resume" in _error(capsys, "demo", "--output", tmp_path / "new", "--resume")

    def test_resume_with_another_model(self, capsys, tmp_path, photos):
        config = to_json(PRETRAIN_RECIPES["demo"]())
        (tmp_path / "run").mkdir()
        begun = {"status": "running", "recipe": "demo", "config": config}
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        arguments = ("demo", "--data", photos, "--output", tmp_path / "run", "--encoder.embed-dim", "64")
        text = _error(capsys, *arguments, "--loop.batch-size", "16")
        assert f"encoder.embed_dim was {config['encoder']['embed_dim']} and is 64" in text

    def test_a_run_that_never_began_does_not_bind_the_next_one(self, capsys, tmp_path):
        arguments = ("demo", "--output", tmp_path / "run", "--data", tmp_path / "no")
        assert "does not exist" in _error(capsys, *arguments)
        assert "does not exist" in _error(capsys, *arguments, "--encoder.embed-dim", "64")
        assert "no run to resume" in _error(capsys, *arguments, "--resume")

    def test_relative_mlflow_store(self, capsys, tmp_path):
        text = _error(capsys, "demo", "--output", tmp_path / "run", "--mlflow-uri", "./mlruns")
        assert "sqlite:////ABSOLUTE" in text


def test_more_workers_than_the_cluster_has(monkeypatch):
    from mixmae.training import worker

    monkeypatch.setattr(worker.ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(worker.ClusterError, match=r"5 workers need 6 CPUs.*has 4.*--workers to 3"):
        worker.require_resources(num_workers=5, use_gpu=False, wait_s=0)
    with pytest.raises(worker.ClusterError, match=r"2 workers need 2 GPUs but the cluster has 0.*--device cpu"):
        worker.require_resources(num_workers=2, use_gpu=True, wait_s=0)
    worker.require_resources(num_workers=3, use_gpu=False, wait_s=0)
    # CPUs for decoding are needed beside GPUs: without one the run would wait for ever.
    monkeypatch.setattr(worker.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(worker.ClusterError, match=r"2 workers need 3 CPUs.*lower --workers to 1 or add nodes"):
        worker.require_resources(num_workers=2, use_gpu=True, wait_s=0)
    # A local cluster has as many logical CPUs as were asked for: its cores are the limit.
    monkeypatch.setattr(worker.ray, "cluster_resources", lambda: {"CPU": 10_000.0})
    with pytest.raises(worker.ClusterError, match="would only wait for each other"):
        worker.require_resources(num_workers=5_000, use_gpu=False, is_own=True)


def test_a_cluster_that_does_not_answer_is_said_within_seconds():
    from mixmae.training import worker

    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(worker.ClusterError, match="No Ray cluster answers at"):
            worker.connect(address, num_workers=1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--workers", "0"), "--workers is 0: it must be at least 1"),
        (("--output", "s3://bucket/run"), "runs are written to a folder"),
    ],
)
def test_flags_that_cannot_be(capsys, flags, sentence):
    text = _error(capsys, "demo", *flags, code=2)
    assert sentence in " ".join(text.replace("│", " ").split())  # it comes in a box


def test_a_damaged_run_file_is_named(capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"status": ')
    text = _error(capsys, "demo", "--output", tmp_path)
    assert f"{tmp_path / 'run.json'} is damaged" in text


def test_a_folder_that_has_grown_is_packed_anew(tmp_path):
    from pipelines.runs import open_data

    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(photos / f"{index}.png")
    before, _ = open_data(str(photos), tmp_path / "data", 60)
    Image.new("RGB", (40, 40), (99, 0, 0)).save(photos / "new.png")
    after, _ = open_data(str(photos), tmp_path / "data", 60)
    assert after.num_rows == before.num_rows + 1
    assert after.digest != before.digest


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


def test_only_what_changes_the_result_counts_as_a_difference():
    before = to_json(PRETRAIN_RECIPES["demo"]())
    now = json.loads(json.dumps(before))
    now["loop"]["log_every_steps"] = 1
    now["stream"]["prefetch_blocks"] = 9
    assert differences(before, now) == []
    now["optim"]["betas"] = [0.9, 0.99]
    assert differences(before, now) == ["optim.betas was [0.9, 0.95] and is [0.9, 0.99]"]
