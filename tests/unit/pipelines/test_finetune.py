"""What a user can get wrong when finetuning: one sentence, before the run starts; and the paper's recipes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mixmae.convert import Preprocessing, save_encoder
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import to_json
from mixmae.training.optim import parameter_groups
from pipelines import finetune
from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES
from pipelines.recipes.demo import demo
from pipelines.recipes.small import SMALL_RECIPES
from tests.factories import tiny_swin
from tests.unit.conftest import coloured_jpeg

LABELS = [row % 4 for row in range(40)]


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    def test_a_pretraining_recipe(self, error):
        text = error(finetune.main, "mixmae_swin_base_300ep", code=2)
        assert "mixmae_swin_base_finetune_100ep" in text

    def test_a_key_without_weights(self, error):
        text = error(finetune.main, "demo_finetune", "--weights-key", "model_ema")
        assert "--weights-key is for the weights of --pretrained" in text

    def test_no_labels(self, error, shards):
        text = error(finetune.main, "demo_finetune", "--data", shards("set", None))
        assert "has no labels" in text
        assert "a folder for each class" in text

    def test_all_labels_unknown(self, error, shards):
        assert "has no labels" in error(finetune.main, "demo_finetune", "--data", shards("set", [-1] * 40))

    def test_labels_with_gaps(self, error, shards):
        """As COCO's ids are: most of the head would never be trained."""
        text = error(finetune.main, "demo_finetune", "--data", shards("set", [row % 4 * 30 for row in range(40)]))
        assert "go up to 90, but only 4 of these numbers are used" in text

    def test_labels_beyond_the_names(self, error, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        images = [{"bytes": coloured_jpeg(row, 0), "path": ""} for row in range(40)]
        table = pa.table({"image": images, "label": LABELS})
        names = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), folder / "train-0.parquet")
        assert "has the label 3, but there are 3 classes (0 to 2)" in error(
            finetune.main, "demo_finetune", "--data", folder
        )

    def test_labels_of_validation_beyond_those_of_training(self, error, shards):
        text = error(finetune.main, "demo_finetune", "--data", shards("set", LABELS, [0, 1, 4]))
        assert "set/validation has the label 4, but there are 4 classes" in text

    def test_a_validation_set_without_labels(self, error, shards):
        text = error(finetune.main, "demo_finetune", "--data", shards("set", LABELS, [-1, -1]))
        assert "set/validation has no image with a class" in text

    def test_one_class(self, error, shards):
        assert "one class" in error(finetune.main, "demo_finetune", "--data", shards("set", [0] * 40))

    def test_drop_path(self, error):
        assert "--encoder.drop-path" in error(finetune.main, "demo_finetune", "--encoder.drop-path", "1.0", code=2)
        assert "--encoder.drop-path" in error(finetune.main, "demo_finetune", "--encoder.drop-path", "-0.1", code=2)

    def test_other_numbers(self, error):
        for flag, value in (("--ema-decay", 1), ("--crop-pct", 0), ("--divergence", 0.5)):
            text = error(finetune.main, "demo_finetune", flag, value, code=2)
            assert flag[2:].replace("-", "_") in text

    def test_more_workers_than_micro_batches_of_a_batch(self, error):
        flags = ("--loop.batch-size", "32", "--loop.micro-batch-size", "16")
        text = error(finetune.main, "demo_finetune", "--workers", "3", *flags)
        assert "32 images, 2 times 16 that stay together, cannot be shared by 3 workers: lower --workers to 2" in text

    def test_missing_weights(self, error, tmp_path):
        assert "does not exist" in error(finetune.main, "demo_finetune", "--pretrained", tmp_path / "no.pth")

    def test_a_run_without_a_checkpoint(self, error, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        text = error(finetune.main, "demo_finetune", "--pretrained", tmp_path / "run")
        assert "without a checkpoint" in text

    def test_weights_of_another_encoder_than_the_flags_say(self, error, tmp_path, shards):
        save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
        arguments = ("demo_finetune", "--pretrained", tmp_path / "encoder.safetensors", "--loop.batch-size", 8)
        text = error(finetune.main, *arguments, "--data", shards("set", LABELS), "--encoder.embed-dim", "64")
        assert "holds weights of a Swin of width 16 with 1-1-2-1 blocks; the model has a Swin of width 64" in text

    def test_resume_with_another_head_or_other_weights(self, error, tmp_path, shards):
        save_encoder(
            tmp_path / "encoder.safetensors", build_encoder(demo().sized_encoder()), Preprocessing(image_size=(64, 64))
        )
        config = to_json(FINETUNE_RECIPES["demo_finetune"]())
        begun = {"status": "running", "config": config, "classes": ["0", "1", "2"], "pretrained": None}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        arguments = ("demo_finetune", "--output", tmp_path / "run")
        text = error(finetune.main, *arguments, "--data", shards("set", LABELS))
        assert "the head has 3 classes and the data 4" in text
        text = error(finetune.main, *arguments, "--pretrained", tmp_path / "encoder.safetensors")
        assert f"pretrained was none and is {tmp_path / 'encoder.safetensors'}" in text


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_recipes_are_named_after_their_functions_and_are_the_papers(name):
    recipe = FINETUNE_RECIPES[name]
    assert recipe.__name__ == name
    if not name.startswith("mixmae_") or recipe in SMALL_RECIPES.values():
        return
    assert "not yet run" in (recipe.__doc__ or "")
    config = recipe()
    assert config.optim.peak_lr(config.loop.batch_size) == pytest.approx(2e-3)
    assert (config.optim.layer_decay, config.optim.betas, config.optim.weight_decay) == (0.7, (0.9, 0.999), 0.05)
    assert (config.loop.batch_size, config.loop.warmup_epochs) == (1024, 5)
    assert (config.augment.magnitude, config.augment.magnitude_std, config.augment.erasing) == (9, 0.5, 0.25)
    assert (config.mixup.mixup, config.mixup.cutmix, config.mixup.label_smoothing) == (0.8, 1.0, 0.1)
    size = next(size for size in ("base", "large", "huge") if size in name)
    lengths = {"base": (100, 0.15), "large": (50, 0.2), "huge": (50, 0.3)}
    assert (config.loop.epochs, config.encoder.drop_path) == lengths[size]
    pretrained = PRETRAIN_RECIPES[f"mixmae_swin_{size}_600ep"]().encoder
    assert (config.encoder.embed_dim, config.encoder.depths) == (pretrained.embed_dim, pretrained.depths)


def test_the_rates_of_the_papers_base():
    """Table 12's layer decay over 24 blocks, on the model that the job builds."""
    config = FINETUNE_RECIPES["mixmae_swin_base_finetune_100ep"]()
    with torch.device("meta"):
        model = ImageClassifier(SwinEncoder(config.sized_encoder()), 1000)
    scales = {name: group["lr_scale"] for group in parameter_groups(model, config.optim) for name in group["names"]}
    assert scales["head.weight"] == pytest.approx(0.7)
    assert scales["encoder.stages.3.blocks.1.mlp.fc1.weight"] == pytest.approx(0.7)
    assert scales["encoder.stages.2.blocks.0.attn.qkv.weight"] == pytest.approx(0.7**20)
    assert scales["encoder.patch_embed.proj.weight"] == pytest.approx(0.7**25)
