"""The config of a run: what may differ when it is continued, and how a batch is cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mixmae.data.images.augment import AugmentConfig
from mixmae.data.images.finetune_augment import FinetuneAugmentConfig
from mixmae.encoders.vit import ViTConfig
from mixmae.jobs.config import FinetuneConfig, PretrainConfig, completed, differences, to_json
from mixmae.methods.mae import MAEConfig
from mixmae.methods.mixmae import MixMAEConfig
from mixmae.methods.simmim import SimMIMConfig
from mixmae.pixels import IMAGENET_MEAN, usual_normalisation
from mixmae.training.checkpoint import upgraded
from pipelines.recipes import FINETUNE_RECIPES, PRETRAIN_RECIPES
from tests.factories import small_swin, tiny_swin


def test_only_what_changes_the_result_counts_as_a_difference():
    before = to_json(PRETRAIN_RECIPES["demo"]())
    now = json.loads(json.dumps(before))
    now["loop"]["log_every_steps"] = 1
    now["stream"]["prefetch_blocks"] = 9
    assert differences(before, now) == []
    now["optim"]["betas"] = [0.9, 0.99]
    assert differences(before, now) == ["optim.betas was [0.9, 0.95] and is [0.9, 0.99]"]


def test_micro_batches_may_change_unless_paths_are_dropped():
    config = PRETRAIN_RECIPES["demo"]()
    before, now = to_json(config), to_json(replace(config, loop=replace(config.loop, micro_batch_size=8)))
    assert not config.encoder.drop_path
    assert differences(before, now) == []
    for content in (before, now):
        content["encoder"]["drop_path"] = 0.1
    assert differences(before, now) == ["loop.micro_batch_size was None and is 8, which would drop other paths"]


def test_micro_batches_may_not_change_where_images_are_mixed_inside_them():
    config = FINETUNE_RECIPES["demo_finetune"]()
    config = replace(config, encoder=replace(config.encoder, drop_path=0.0))

    def found(probability):
        given = replace(config, mixup=replace(config.mixup, mixup=0.8, probability=probability))
        return differences(to_json(given), to_json(replace(given, loop=replace(given.loop, micro_batch_size=8))))

    assert found(0.0) == []
    assert found(1.0) == ["loop.micro_batch_size was None and is 8, which would mix other images"]


def test_what_stays_together_on_a_worker():
    """The images of a mix; where micro-batches draw, whole ones, if they have a size."""
    plain = PRETRAIN_RECIPES["demo"]()
    plain = replace(plain, method=MixMAEConfig(num_images=4), loop=replace(plain.loop, batch_size=48))
    dropping = replace(plain, encoder=replace(plain.encoder, drop_path=0.1))
    finetuning = FINETUNE_RECIPES["demo_finetune"]()

    def block(config, micro_batch_size):
        return replace(config, loop=replace(config.loop, micro_batch_size=micro_batch_size)).block

    assert [block(plain, size) for size in (None, 8)] == [4, 4]
    assert [block(dropping, size) for size in (None, 8, 6)] == [4, 8, 4]  # 6 is refused by the share
    assert [block(finetuning, size) for size in (None, 8)] == [1, 8]
    assert plain.share(num_workers=5, rank=4).micro_batches == (12,)
    with pytest.raises(ValueError, match="micro-batch of 6 images cannot be cut into parts of 4"):
        replace(dropping, loop=replace(dropping.loop, micro_batch_size=6)).share(num_workers=1)
    with pytest.raises(ValueError, match=r"batch of 48 images cannot be cut into parts of 32.*loop\.micro-batch-size"):
        replace(dropping, loop=replace(dropping.loop, micro_batch_size=32)).share(num_workers=1)


def test_fields_that_an_earlier_version_did_not_have_are_as_their_defaults():
    config = PRETRAIN_RECIPES["demo"]()
    before = to_json(config)
    del before["optim"]["clip_grad_norm"], before["loop"]["max_loss"], before["augment"]["image_size"]
    assert differences(completed(before, config), to_json(config)) == [
        f"augment.image_size was {AugmentConfig().image_size} and is {config.augment.image_size}"
    ]


def test_a_run_begun_before_there_was_a_probe_goes_on():
    now = to_json(PRETRAIN_RECIPES["demo"]())
    before = {name: value for name, value in now.items() if name != "probe"}
    assert differences(before, now) == []
    assert differences({**now, "probe": {"images": 0, "k": 1}}, now) == []


def test_configs_of_earlier_versions_are_understood():
    """Their names for the evaluation's interval and for the validation's crop."""
    for now in (to_json(PRETRAIN_RECIPES["demo"]()), to_json(FINETUNE_RECIPES["demo_finetune"]())):
        before = json.loads(json.dumps(now))
        before["loop"]["panel_every_epochs"] = before["loop"].pop("evaluate_every_epochs")
        if "crop_pct" in before:
            before["resize_share"] = before.pop("crop_pct")
        assert upgraded(before) == upgraded(now) == now
        assert "panel_every_epochs" in before["loop"]  # the argument is left alone


def test_mean_and_std_follow_the_encoders_channels_unless_they_are_given():
    rgb = PRETRAIN_RECIPES["demo"]()
    grey = replace(rgb, encoder=replace(rgb.encoder, in_channels=1))
    assert (grey.pixel_mean, grey.pixel_std) == usual_normalisation(1)
    assert replace(grey, encoder=rgb.encoder) == rgb
    assert rgb.pixel_mean == IMAGENET_MEAN
    own = replace(rgb, encoder=grey.encoder, pixel_mean=(0.1,), pixel_std=(0.3,))
    assert (own.pixel_mean, own.pixel_std) == ((0.1,), (0.3,))
    with pytest.raises(ValueError, match="need a value for each of the encoder's 3 channels"):
        replace(own, encoder=rgb.encoder)


def test_channels_that_no_file_is_read_with():
    rgb = PRETRAIN_RECIPES["demo"]()
    with pytest.raises(ValueError, match=r"in_channels is 13: .* change --encoder.in-channels"):
        replace(rgb, encoder=replace(rgb.encoder, in_channels=13))


def test_a_run_begun_before_there_was_a_patch_size_goes_on():
    now = to_json(PRETRAIN_RECIPES["demo"]())
    before = json.loads(json.dumps(now))
    before["encoder"].pop("patch_px")
    before["method"].pop("cell_px")
    now = to_json(replace(PRETRAIN_RECIPES["demo"](), method=MixMAEConfig(num_images=2)))
    assert not [change for change in differences(before, now) if "patch_px" in change or "cell_px" in change]


SMALL = small_swin().config  # a last stride of 4 px


def pretrain(encoder, image_size, method):
    return PretrainConfig(encoder=encoder, augment=AugmentConfig(image_size=image_size), method=method)


@pytest.mark.parametrize(
    ("encoder", "image_size", "method"),
    [
        (SMALL, 8, MixMAEConfig()),
        (SMALL, (28, 40), MixMAEConfig(num_images=2)),
        (SMALL, 32, MixMAEConfig(cell_px=16)),
        (SMALL, 32, SimMIMConfig(cell_px=8)),
        (ViTConfig(patch_px=4), 28, MixMAEConfig(cell_px=4)),
        (ViTConfig(patch_px=14), 28, MAEConfig()),
        (tiny_swin().config, 64, MixMAEConfig()),
    ],
)
def test_sizes_that_fit(encoder, image_size, method):
    pretrain(encoder, image_size, method)


@pytest.mark.parametrize(
    ("encoder", "image_size", "method", "remedy"),
    [
        (SMALL, 30, MixMAEConfig(), "each side must be a multiple of 4 px.*--augment.image-size 28 or 32.*patch-px"),
        (SMALL, (32, 33), MixMAEConfig(), "--augment.image-size 32 or 32 36"),
        (SMALL, 32, MixMAEConfig(cell_px=12), "--augment.image-size 24 or 36, or --method.cell-px 4"),
        (SMALL, 32, MixMAEConfig(cell_px=64), "multiple of 64 px, the side of a mask cell.*size 64, or"),
        (SMALL, 32, MixMAEConfig(cell_px=6), "--method.cell-px is 6.*a multiple of 4, or.*--encoder.patch-px"),
        (SMALL, 32, SimMIMConfig(cell_px=2), "--method.cell-px is 2.*a multiple of 4"),
        (SMALL, 32, MixMAEConfig(cell_px=0), "--method.cell-px is 0"),
        (ViTConfig(patch_px=4), 28, MixMAEConfig(), "--augment.image-size 24 or 32, or --method.cell-px 4"),
        (tiny_swin().config, 28, MixMAEConfig(), "--augment.image-size 32, or a smaller --encoder.patch-px"),
        (tiny_swin().config, 32, MixMAEConfig(), "1 mask cell of 32 px, and the method needs 4.*--method.num-images"),
        (SMALL, (8, 16), MixMAEConfig(cell_px=8), "2 mask cells.*a smaller --method.cell-px"),
        (SMALL, 8, MixMAEConfig(num_images=2, mask_token_share=0.8), "4 mask cells of 4 px, and the method needs 10"),
        (SMALL, (4, 8), SimMIMConfig(), "2 mask cells.*needs 3.*--method.mask-ratio"),
        (ViTConfig(patch_px=14), 32, MAEConfig(), "--augment.image-size 28 or 42"),
    ],
)
def test_sizes_that_do_not_fit_name_the_flag(encoder, image_size, method, remedy):
    with pytest.raises(ValueError, match=remedy) as caught:
        pretrain(encoder, image_size, method)
    assert str(caught.value).count(". ") == 0  # one sentence


def test_a_classifier_needs_whole_tokens():
    """Checked when the encoder is known: that of the weights may take the recipe's place."""
    config = FinetuneConfig(encoder=tiny_swin().config, augment=FinetuneAugmentConfig(image_size=28))
    with pytest.raises(ValueError, match=r"a multiple of 32 px.*use --augment.image-size 32"):
        config.check_size()
    replace(config, encoder=SMALL).check_size()
