"""The recipes: found by name, buildable, whole after a trip through the command line, and what the paper says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro

from mixmae.encoders.build import build_encoder, config_from_json, size_name
from mixmae.finetune.classification import ImageClassifier
from mixmae.jobs.config import differences, to_json
from mixmae.methods.build import build_method
from mixmae.methods.mae import MAEConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from pipelines.pretrain import Arguments
from pipelines.recipes import (
    DETECT_RECIPES,
    FINETUNE_RECIPES,
    LINEAR_PROBE_RECIPES,
    PRETRAIN_RECIPES,
    RECIPE_GROUPS,
    SEGMENT_RECIPES,
    find_recipe,
    list_recipes,
)
from pipelines.recipes.finetune import TRANSFER_RECIPES
from pipelines.recipes.mixmae_ablations import MIXMAE_ABLATIONS
from pipelines.recipes.small import SMALL_RECIPES
from tune_spaces.transfer import TRANSFERS

ROOT = Path(__file__).parents[3]

ALL = {**PRETRAIN_RECIPES, **FINETUNE_RECIPES, **LINEAR_PROBE_RECIPES}
SMALL = [recipe.__name__ for recipe in SMALL_RECIPES]
PAPER = [name for name in PRETRAIN_RECIPES if name not in ("demo", *SMALL)]
TRANSFER = [recipe.__name__ for recipe in TRANSFER_RECIPES]
"""Finetuning on other sets than ImageNet (table 5)."""
DENSE = {name: recipe for name, recipe in {**SEGMENT_RECIPES, **DETECT_RECIPES}.items() if "demo" not in name}
"""On ADE20K and COCO (tables 4 and 13 to 16)."""
METHODS = {"mixmae": MixMAEConfig, "simmim": SimMIMConfig, "mae": MAEConfig}
BASE = "mixmae_swin_base_300ep_images_2"
ABLATIONS = {
    "mixmae_swin_base_600ep_images_2": {"loop.epochs": 600},
    "mixmae_swin_base_900ep_images_2": {"loop.epochs": 900},
    **{
        f"mixmae_swin_base_300ep_fill_{fill}": {"method.fill": fill, "method.unmixing": "none"}
        for fill in ("zero", "learnable", "shuffle", "zoom")
    },
    "mixmae_swin_base_600ep_as_mae": {"loop.epochs": 600, "method.num_images": 4, "method.fill": "zero"},
    "mixmae_swin_base_300ep_images_2_mask_tokens": {"method.mask_token_share": 0.5},
    "mixmae_swin_base_300ep_images_3": {"method.num_images": 3, "loop.batch_size": 1032},
    "mixmae_swin_base_300ep_images_5": {"method.num_images": 5, "loop.batch_size": 1040},
    "mixmae_swin_base_300ep_single": {"method.dual": False},
    **{
        f"mixmae_swin_base_{epochs}ep_unmixing_{unmixing}": {"method.unmixing": unmixing}
        | ({} if epochs == 300 else {"loop.epochs": epochs})
        for unmixing in ("none", "embedding")
        for epochs in (300, 600, 900)
    },
}
"""What each ablation changes in BASE."""


def changes(before, now):
    """Name the fields of `now` that differ from `before`, with their values as text."""
    found = differences(to_json(before), to_json(now))
    return dict(re.fullmatch(r"(\S+) was .* and is (.*)", line).groups() for line in found)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_is_named_after_its_function_and_says_what_it_is(name):
    recipe = ALL[name]
    assert recipe.__name__ == name
    assert find_recipe(name, ALL) is recipe
    assert len(recipe.__doc__.splitlines()[0]) < 80  # a line of the list


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_every_recipe_of_pretraining_builds(name):
    config = PRETRAIN_RECIPES[name]()
    with torch.device("meta"):
        build_method(build_encoder(config.sized_encoder()), config.method)


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_a_config_survives_the_command_line_and_json(name):
    config = PRETRAIN_RECIPES[name]()
    default = Arguments(config=config)
    assert tyro.cli(Arguments, args=[], default=default, config=(tyro.conf.AvoidSubcommands,)).config == config
    content = to_json(config)
    assert json.loads(json.dumps(content)) == content
    assert config_from_json(content["encoder"]) == config.encoder


@pytest.mark.parametrize("name", PAPER)
def test_a_name_says_method_and_epochs_and_the_docstring_what_to_expect(name):
    config, text = PRETRAIN_RECIPES[name](), " ".join(PRETRAIN_RECIPES[name].__doc__.split())
    assert type(config.method) is METHODS[name.split("_")[0]]
    assert f"_{config.loop.epochs}ep" in name
    assert config.loop.precision == "bfloat16"
    config.share(num_workers=8)  # eight workers can share the batch
    assert text.endswith("Ours: not yet run.")
    assert "paper" in text
    told = re.search(r"Command:? .*?(pretrain\.py|hardware: as) (\w+)", text)
    assert told.group(2) == name if told.group(1) == "pretrain.py" else told.group(2) in PRETRAIN_RECIPES


@pytest.mark.parametrize(
    ("method", "batch_size", "peak_lr", "warmup_epochs"),
    [("mixmae", 1024, 6e-4, 40), ("simmim", 2048, 4e-4, 10), ("mae", 4096, 2.4e-3, 40)],
)
def test_rates_are_the_published_ones(method, batch_size, peak_lr, warmup_epochs):
    changed = {name for name, change in ABLATIONS.items() if "loop.batch_size" in change}
    names = [name for name in PAPER if name.startswith(f"{method}_") and name not in changed]
    assert names
    for config in (PRETRAIN_RECIPES[name]() for name in names):
        assert (config.loop.batch_size, config.loop.warmup_epochs) == (batch_size, warmup_epochs)
        assert config.optim.peak_lr(batch_size) == pytest.approx(peak_lr)
        assert config.optim.weight_decay == 0.05


def test_mixmae_outside_the_ablations_hides_three_quarters():
    ablations = {recipe.__name__ for recipe in MIXMAE_ABLATIONS}
    configs = [PRETRAIN_RECIPES[name]() for name in PAPER if name.startswith("mixmae_") and name not in ablations]
    assert configs
    assert all(config.method == MixMAEConfig() and config.augment.image_size == 224 for config in configs)


def test_all_ablations_are_checked():
    assert {recipe.__name__ for recipe in MIXMAE_ABLATIONS} == {BASE, *ABLATIONS}
    assert changes(PRETRAIN_RECIPES["mixmae_swin_base_300ep"](), PRETRAIN_RECIPES[BASE]()) == {"method.num_images": "2"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_in_what_it_ablates_alone(name):
    expected = {field: str(value) for field, value in ABLATIONS[name].items()}
    assert changes(PRETRAIN_RECIPES[BASE](), PRETRAIN_RECIPES[name]()) == expected


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        (BASE, 50),
        ("mixmae_swin_base_300ep_images_2_mask_tokens", 75),
        ("mixmae_swin_base_300ep_images_3", 67),
        ("mixmae_swin_base_300ep", 75),
        ("mixmae_swin_base_300ep_images_5", 80),
        ("mixmae_swin_base_300ep_fill_zero", 50),
        ("simmim_swin_base_300ep", 60),
        ("mae_vit_base_1600ep", 75),
    ],
)
def test_mask_ratios_are_the_papers(name, percent):
    assert round(100 * PRETRAIN_RECIPES[name]().method.mask_ratio) == percent


def test_simmim_is_set_up_as_its_authors_do():
    base, vit = (PRETRAIN_RECIPES[f"simmim_{name}_800ep"]() for name in ("swin_base_w7", "vit_base"))
    assert (base.augment.image_size, vit.augment.image_size) == (192, 224)
    assert (base.augment.crop_scale, base.optim.betas, base.optim.clip_grad_norm) == ((0.67, 1.0), (0.9, 0.999), 5.0)
    assert base.encoder.shift
    # Windows divide the grids at 192 px, so that no stage is padded.
    for name in ("swin_base_w7_800ep", "swin_base_300ep", "swin_large_800ep", "twins_svt_large_800ep"):
        windows = PRETRAIN_RECIPES[f"simmim_{name}"]().encoder.window_sizes
        assert all(side % window == 0 for side, window in zip((48, 24, 12, 6), windows, strict=True))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mixmae_swin_base_w7_600ep", "swin_base_w7"),
        ("mixmae_swin_huge_600ep", "swin_huge"),
        ("mixmae_pvt_large_600ep", "pvt_large"),
        ("mixmae_twins_svt_large_600ep", "twins_svt_large"),
        ("mixmae_vit_base_600ep", "vit_base"),
        ("mixmae_resnetv2_101x3_600ep", "resnetv2_101x3"),
        ("simmim_pvt_large_800ep", "pvt_large"),
    ],
)
def test_a_name_says_the_encoder(name, size):
    assert size_name(PRETRAIN_RECIPES[name]().encoder) == size


def test_the_list_has_each_recipe_once_below_its_heading():
    lines = list_recipes(PRETRAIN_RECIPES).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("    ")] == list(PRETRAIN_RECIPES)
    assert sum(map(len, RECIPE_GROUPS.values())) == len(PRETRAIN_RECIPES)  # no name is taken twice
    assert lines.index("  SimMIM (tables 2 to 4)") + 1 == next(
        number for number, line in enumerate(lines) if "simmim_swin_base_w7_800ep" in line
    )


def test_an_unknown_name_like_no_other_is_told_where_the_list_is():
    with pytest.raises(ValueError, match="without arguments lists them"):
        find_recipe("qqq", PRETRAIN_RECIPES)


def test_the_results_name_every_recipe_of_the_paper_with_its_figures():
    """docs/results.md: each recipe is there, none is unknown, and its rows have what its docstring expects."""
    text = (ROOT / "docs" / "results.md").read_text()
    assert set(re.findall(r"`((?:mixmae|simmim|mae)_\w+)`", text)) == {*PAPER, *TRANSFER, *DENSE}
    for name in (*PAPER, *TRANSFER, *DENSE):
        rows = " ".join(line for line in text.splitlines() if f"`{name}`" in line)
        expected = {**ALL, **DENSE}[name].__doc__.split("Expected:")[1]
        assert all(figure in rows for figure in re.findall(r"\d\d\.\d", expected)), name


def test_the_dense_recipes_of_a_row_take_the_encoder_of_its_pretraining():
    """docs/results.md: each row of ADE20K and COCO names one recipe of each, of the same widths and depths."""
    text = (ROOT / "docs" / "results.md").read_text().split("## Tables 4 and 13 to 16")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", line) for line in text.splitlines() if "not yet run" in line]
    assert len(rows) == 18
    for pretraining, segmenting, detecting in rows:
        encoder = PRETRAIN_RECIPES[pretraining]().encoder
        for config in (SEGMENT_RECIPES[segmenting](), DETECT_RECIPES[detecting]()):
            assert (config.encoder.embed_dim, config.encoder.depths) == (encoder.embed_dim, encoder.depths)


@pytest.mark.parametrize("transfer", TRANSFERS, ids=lambda transfer: transfer.name)
@pytest.mark.parametrize(("size", "epochs"), [("base", 100), ("large", 50)])
def test_finetuning_on_another_set_has_the_settings_of_imagenet_and_a_docstring_of_its_own(transfer, size, epochs):
    """Appendix A.1: "we reuse the setting in Table 12"."""
    name = f"mixmae_swin_{size}_{transfer.name}_finetune_{epochs}ep"
    recipe = FINETUNE_RECIPES[name]
    assert recipe() == FINETUNE_RECIPES[f"mixmae_swin_{size}_finetune_{epochs}ep"]()
    text = " ".join(recipe.__doc__.split())
    for part in (
        f"{epochs} epochs of {transfer.title}.",
        f"Command: python pipelines/finetune.py {name} ",
        f"Data: {transfer.num_classes:,} classes, {transfer.train_images:,} training",
        f"Expected: {getattr(transfer, f'{size}_top1')} % top-1 (paper, table 5",
        "Ours: not yet run.",
    ):
        assert part in text


def test_the_sizes_of_the_other_sets_are_those_of_the_documentation():
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    for transfer in TRANSFERS:
        counts = (transfer.num_classes, transfer.train_images, transfer.val_images)
        row = f"| {transfer.title} | {' | '.join(f'{count:,}' for count in counts)} |"
        assert any(line.startswith(row) for line in lines), row


@pytest.mark.parametrize(("pretraining", "finetuning"), SMALL_RECIPES.items(), ids=SMALL)
def test_small_images_go_through_pretraining_and_finetuning_of_one_encoder(pretraining, finetuning):
    before, after = pretraining(), finetuning()
    assert replace(after.sized_encoder(), drop_path=before.encoder.drop_path) == before.sized_encoder()
    size, channels = before.augment.size, before.encoder.in_channels
    told = re.match(r"mixmae_swin_(\d+)px_(grey_)?(\d+)ep", pretraining.__name__)
    assert (told[1], told[2] is not None, told[3]) == (str(size[0]), channels == 1, str(before.loop.epochs))
    assert f"_{after.loop.epochs}ep" in finetuning.__name__
    cells = (size[0] // before.method.cell_px_on(before.encoder)) ** 2
    assert 36 <= cells <= 64  # the paper has 49
    images = before.normalise(torch.randint(0, 256, (4, channels, *size), dtype=torch.uint8))
    model = build_method(build_encoder(before.sized_encoder()), before.method)
    assert model(images, generator=torch.Generator().manual_seed(0)).loss.isfinite()
    assert ImageClassifier(build_encoder(after.sized_encoder()), 7)(images).shape == (4, 7)
    for text in (pretraining.__doc__, finetuning.__doc__):
        assert "Expected: not yet run." in text
    before.share(num_workers=8)


def test_the_28_px_recipes_take_colours_with_one_flag():
    for recipe in (*SMALL_RECIPES.items(),)[0]:
        grey = recipe()
        coloured = replace(grey, encoder=replace(grey.encoder, in_channels=3))
        assert len(coloured.pixel_mean) == 3
