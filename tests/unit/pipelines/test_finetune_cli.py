"""What a user can get wrong when finetuning, evaluating and predicting: one sentence, before time is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mixmae.convert import Preprocessing, save_encoder, to_official
from mixmae.encoders.build import build_encoder
from mixmae.encoders.swin import SwinConfig, SwinEncoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import to_json
from mixmae.metrics import top_k_accuracy
from mixmae.training.optim import parameter_groups
from pipelines import evaluate, finetune, predict, runs
from pipelines.finetune import INITIAL_FILE, Arguments, FinetuneJob, take_pretrained
from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES
from tests.factories import tiny_mixmae, tiny_swin, tiny_vit


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Any attempt to start Ray or MLflow fails the test: these errors must come first."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached the cluster")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "connect", refuse)
    monkeypatch.setattr(runs, "create_run", refuse)


def _jpeg(seed: int) -> bytes:
    import io

    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Writes a set of given labels, or without a label column for None, and returns its folder."""

    def write(name: str, labels: list[int] | None, validation: list[int] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, values in (("train", labels), ("validation", validation)):
            if split == "train" or values is not None:
                images = [{"bytes": _jpeg(row), "path": f"{row}.jpg"} for row in range(len(values or range(40)))]
                columns = {"image": images, **({} if values is None else {"label": values})}
                pq.write_table(pa.table(columns), folder / f"{split}-0.parquet", row_group_size=16)
        return folder

    return write


def _error(capsys, *argv: object, code: int = 1, main=finetune.main) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(item) for item in argv])
    assert stop.value.code == code
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


LABELS = [row % 4 for row in range(40)]


@pytest.mark.usefixtures("no_cluster")
class TestMistakes:
    def test_a_pretraining_recipe(self, capsys):
        text = _error(capsys, "mixmae_swin_base_300ep", code=2)
        assert "mixmae_swin_base_finetune_100ep" in text

    def test_no_labels(self, capsys, shards):
        text = _error(capsys, "demo_finetune", "--data", shards("set", None))
        assert "has no labels" in text
        assert "a folder for each class" in text

    def test_all_labels_unknown(self, capsys, shards):
        assert "has no labels" in _error(capsys, "demo_finetune", "--data", shards("set", [-1] * 40))

    def test_labels_with_gaps(self, capsys, shards):
        """As COCO's ids are: most of the head would never be trained."""
        text = _error(capsys, "demo_finetune", "--data", shards("set", [row % 4 * 30 for row in range(40)]))
        assert "go up to 90, but only 4 of these numbers are used" in text

    def test_labels_beyond_the_names(self, capsys, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        table = pa.table({"image": [{"bytes": _jpeg(row), "path": ""} for row in range(40)], "label": LABELS})
        names = {"info": {"features": {"label": {"names": ["cat", "dog", "emu"]}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), folder / "train-0.parquet")
        assert "has the label 3, but there are 3 classes (0 to 2)" in _error(capsys, "demo_finetune", "--data", folder)

    def test_labels_of_validation_beyond_those_of_training(self, capsys, shards):
        text = _error(capsys, "demo_finetune", "--data", shards("set", LABELS, [0, 1, 4]))
        assert "set/validation has the label 4, but there are 4 classes" in text

    def test_a_validation_set_without_labels(self, capsys, shards):
        text = _error(capsys, "demo_finetune", "--data", shards("set", LABELS, [-1, -1]))
        assert "set/validation has no image with a class" in text

    def test_one_class(self, capsys, shards):
        assert "one class" in _error(capsys, "demo_finetune", "--data", shards("set", [0] * 40))

    def test_drop_path(self, capsys):
        assert "drop_path" in _error(capsys, "demo_finetune", "--encoder.drop-path", "1.0", code=2)
        assert "drop_path" in _error(capsys, "demo_finetune", "--encoder.drop-path", "-0.1", code=2)

    def test_other_numbers(self, capsys):
        for flag, value in (("--ema-decay", 1), ("--resize-share", 0), ("--divergence", 0.5)):
            text = _error(capsys, "demo_finetune", flag, value, code=2)
            assert flag[2:].replace("-", "_") in text

    def test_batch_not_divisible_by_the_workers(self, capsys):
        text = _error(capsys, "demo_finetune", "--workers", "3", "--loop.batch-size", "32")
        assert "shared equally by 3 workers" in text

    def test_missing_weights(self, capsys, tmp_path):
        assert "does not exist" in _error(capsys, "demo_finetune", "--pretrained", tmp_path / "no.pth")

    def test_a_run_without_a_checkpoint(self, capsys, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{}")
        text = _error(capsys, "demo_finetune", "--pretrained", tmp_path / "run")
        assert "without a checkpoint" in text

    def test_weights_of_another_encoder_than_the_flags_say(self, capsys, tmp_path, shards):
        save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
        arguments = ("demo_finetune", "--pretrained", tmp_path / "encoder.safetensors", "--loop.batch-size", 8)
        text = _error(capsys, *arguments, "--data", shards("set", LABELS), "--encoder.embed-dim", "64")
        assert "holds weights of a Swin of width 16 with 1-1-2-1 blocks; the model has a Swin of width 64" in text

    def test_resume_with_another_head_or_other_weights(self, capsys, tmp_path, shards):
        save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
        config = to_json(FINETUNE_RECIPES["demo_finetune"]())
        begun = {"status": "running", "config": config, "classes": ["0", "1", "2"], "pretrained": None}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
        arguments = ("demo_finetune", "--output", tmp_path / "run")
        text = _error(capsys, *arguments, "--data", shards("set", LABELS))
        assert "the head has 3 classes and the data 4" in text
        text = _error(capsys, *arguments, "--pretrained", tmp_path / "encoder.safetensors")
        assert f"pretrained was none and is {tmp_path / 'encoder.safetensors'}" in text


def _taken(recipe: str, **fields: object):
    config = FINETUNE_RECIPES[recipe]()
    arguments = Arguments(config=replace(config, **fields.pop("config", {})), **fields)  # type: ignore[arg-type]
    return take_pretrained(arguments, recipe)


def test_the_file_says_the_encoder_and_the_recipe_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    preprocessing = Preprocessing(image_size=(96, 96), mean=(0.1, 0.2, 0.3))
    for name, encoder in (("swin", tiny_swin()), ("vit", tiny_vit())):
        save_encoder(tmp_path / f"{name}.safetensors", encoder, preprocessing)
        pretrained, arguments = _taken("demo_finetune", pretrained=tmp_path / f"{name}.safetensors")
        expected = replace(encoder.config, drop_path=0.0, image_size=arguments.config.augment.image_size)
        assert arguments.config.sized_encoder() == expected
        assert arguments.config.pixel_mean == (0.1, 0.2, 0.3)
        assert pretrained.weights.metadata.encoder == encoder.config
        assert "note: the encoder is the one of" in capsys.readouterr().out
    torch.save({"model": to_official(tiny_mixmae(image_size=64).state_dict())}, tmp_path / "official.pth")
    pretrained, arguments = _taken("demo_finetune", pretrained=tmp_path / "official.pth")
    assert arguments.config.encoder.embed_dim == 16
    finetune.keep_initial(pretrained, arguments.config, tmp_path / "run")
    model = _job(arguments.config, tmp_path / "run", pretrained=True).build_model()
    theirs = pretrained.weights.state["encoder.stages.1.blocks.0.mlp.fc1.weight"]
    assert torch.equal(model.encoder.stages[1].blocks[0].mlp.fc1.weight, theirs)
    # What the command line says of the encoder, and of pixels, stays.
    own = SwinConfig(image_size=96, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_sizes=(3,) * 4)
    fields = {"encoder": own, "pixel_mean": (0.5, 0.5, 0.5)}
    _, arguments = _taken("demo_finetune", pretrained=tmp_path / "swin.safetensors", config=fields)
    assert arguments.config.encoder == own
    assert arguments.config.pixel_mean == (0.5, 0.5, 0.5)


def test_weights_at_224_px_are_for_the_windows_of_384_px(tmp_path, monkeypatch, capsys):
    """A narrow stand-in of Swin-B, so that its file is small: the default windows turn into the official ones."""
    monkeypatch.chdir(tmp_path)
    small = SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
    save_encoder(tmp_path / "small.safetensors", build_encoder(small), Preprocessing(image_size=(224, 224)))
    pretrained, arguments = _taken("mixmae_swin_base_384px_finetune_100ep", pretrained=tmp_path / "small.safetensors")
    encoder = arguments.config.sized_encoder()
    assert (encoder.image_size, encoder.window_sizes, encoder.drop_path) == (384, (16, 16, 24, 12), 0.15)
    finetune.keep_initial(pretrained, arguments.config, tmp_path / "run")
    assert "5 resized" in capsys.readouterr().out  # four tables of relative positions, one of absolute ones
    model = _job(arguments.config, tmp_path / "run", pretrained=True).build_model()
    assert model.encoder.pos_embed.shape == (1, 96 * 96, 8)


def _job(config, folder: Path, *, pretrained: bool, **fields) -> FinetuneJob:
    usual = {"source": None, "validation": None, "num_classes": 20, "run": None}
    initial = folder / INITIAL_FILE if pretrained else None
    return FinetuneJob(config=config, folder=folder, initial=initial, **{**usual, **fields})


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_recipes_are_named_after_their_functions_and_are_the_papers(name):
    recipe = FINETUNE_RECIPES[name]
    assert recipe.__name__ == name
    if not name.startswith("mixmae_"):
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


def test_shares_of_the_validation_set_add_up_to_the_whole(tmp_path, shards, monkeypatch):
    """Three workers on 13 images, one of them without a class, against one worker and the metrics."""
    from mixmae.data.blocks import eval_batches
    from mixmae.data.sources.open import open_source
    from mixmae.probing.features import predict_logits

    folder = shards("set", [*[row % 4 for row in range(12)], -1])
    source = open_source(folder)
    config = FINETUNE_RECIPES["demo_finetune"]()
    job = _job(config, tmp_path, pretrained=False, validation=source, num_classes=4)
    torch.manual_seed(0)
    model = job.build_model()
    torch.nn.init.normal_(model.head.weight)
    batches = eval_batches(source, config.augment.image_size, batch_size=5)
    logits, labels = predict_logits(model, batches, mean=config.pixel_mean, std=config.pixel_std)
    expected = top_k_accuracy(logits, labels, ks=(1, 5))
    whole = job.evaluate(model, rank=0, num_workers=1)
    assert whole["val/top1"] == expected.top[1]
    assert whole["val/top5"] == expected.top[5] == 1.0
    loss = torch.nn.functional.cross_entropy(logits[:12], labels[:12]).item()
    assert whole["val/loss"] == pytest.approx(loss, rel=1e-5)

    parts: list[torch.Tensor] = []
    monkeypatch.setattr(finetune.dist, "all_reduce", lambda sums: parts.append(sums.clone()))
    for rank in range(3):
        job.evaluate(model, rank=rank, num_workers=3)
    count, loss, top1, top5 = torch.stack(parts).sum(dim=0).tolist()
    assert count == 12
    assert {"val/loss": loss / 12, "val/top1": top1 / 12, "val/top5": top5 / 12} == pytest.approx(whole, rel=1e-5)


def test_a_model_that_has_diverged_is_never_right(tmp_path, shards):
    """No logit is above a NaN: without care all images would count as right, and these weights be kept as the best."""
    from mixmae.data.sources.open import open_source

    job = _job(
        FINETUNE_RECIPES["demo_finetune"](),
        tmp_path,
        pretrained=False,
        validation=open_source(shards("set", LABELS[:8])),
        num_classes=4,
    )
    model = job.build_model()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    metrics = job.evaluate(model, rank=0, num_workers=1)
    assert (metrics["val/top1"], metrics["val/top5"]) == (0, 0)


class TestEvaluateAndPredict:
    @pytest.fixture
    def classifier(self, tmp_path) -> Path:
        path = tmp_path / "classifier.safetensors"
        save_encoder(path, ImageClassifier(tiny_swin(), 4), Preprocessing(image_size=(96, 96)))
        return path

    def test_mistakes(self, capsys, tmp_path, shards, classifier):
        def error(*argv: object) -> str:
            return _error(capsys, *argv, main=evaluate.main)

        save_encoder(tmp_path / "encoder.safetensors", tiny_swin(), Preprocessing(image_size=(96, 96)))
        assert "without a classifier" in error(tmp_path / "encoder.safetensors", "--data", shards("a", LABELS))
        assert "--data SOURCE" in error(classifier)
        assert "no labels to judge by" in error(classifier, "--data", shards("b", None))
        text = error(classifier, "--data", shards("c", [*LABELS, 4]))
        assert "has the label 4, but the model knows 4 classes" in text
        assert "--batch-size is 0" in error(classifier, "--data", tmp_path / "a", "--batch-size", 0)
        assert "does not exist" in error(tmp_path / "no", "--data", tmp_path / "a")
        text = _error(capsys, classifier, tmp_path / "no", main=predict.main)
        assert "does not exist" in text

    def test_a_file_is_judged_and_predicts(self, tmp_path, shards, classifier):
        data = shards("set", LABELS)
        assert evaluate.main([str(classifier), "--data", str(data), "--output", str(tmp_path / "judged")]) == 0
        numbers = json.loads((tmp_path / "judged" / "metrics.json").read_text())
        assert numbers["num_judged"] == 40
        assert numbers["top5"] == 1.0  # of four classes
        assert predict.main([str(classifier), str(data), "--output", str(tmp_path / "said")]) == 0
        lines = (tmp_path / "said" / "predictions.csv").read_text().splitlines()
        assert len(lines) == 41
        assert lines[0] == "file,class,probability,top5"
        assert "train-0.parquet#0 / 0.jpg," in lines[1]
