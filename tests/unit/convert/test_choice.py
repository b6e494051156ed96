"""Prefixes are stripped, and one of several sets of weights is chosen, alike in every kind of file."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from mixmae.convert import load_encoder, read_state_dict, read_weights, to_mmpretrain, to_official
from tests.factories import same, tiny_mixmae, tiny_swin, tiny_vit

SWIN = tiny_swin().state_dict()


def flat(content, prefix=""):
    """Nested mappings as safetensors has them: tensors by names with dots."""
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            tensors[prefix + key] = value.clone()
    return tensors


def below(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def filled(value, state=SWIN):
    return {name: torch.full_like(tensor, value) for name, tensor in state.items()}


@pytest.fixture(params=["pth", "safetensors"])
def write(request, tmp_path):
    """Writes nested content to a file of each kind."""

    def write(content):
        path = tmp_path / f"weights.{request.param}"
        if request.param == "pth":
            torch.save(content, path)
        else:
            save_file(flat(content), path)
        return path

    return write


PREFIXES = [
    "module.",
    "_orig_mod.",
    "_orig_mod.module.",
    "model.",
    "backbone.",
    "encoder.",
    "module.encoder.",
    "model.backbone.",
    "model.encoder.",
    "model._orig_mod.",
    "student.module.backbone.",
    "teacher.backbone.",
    "net.visual.trunk.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(write, prefix):
    assert same(load_encoder(write(below(prefix, SWIN)))[0].state_dict(), SWIN)


FOREIGN = {
    "official": lambda: to_official(tiny_swin().state_dict()),
    "mmpretrain": lambda: to_mmpretrain(tiny_swin().state_dict()),
    "timm Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=12, num_heads=(1, 2, 2, 2)
    ).state_dict(),
    "timm ViT": lambda: timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5).state_dict(),
    "timm PVT v2": lambda: timm.create_model("pvt_v2_b0", num_classes=3).state_dict(),
    "ours": lambda: tiny_mixmae().state_dict(),
    "our ViT": lambda: below("encoder.", tiny_vit().state_dict()),
}


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "model.backbone."])
@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_prefixes_of_every_format(write, tmp_path, state, prefix):
    """The same as without them; an encoder's own prefix is no wrapper."""
    state = state()
    torch.save(state, tmp_path / "plain.pth")
    expected = read_weights(tmp_path / "plain.pth")
    read = read_weights(write(below(prefix, state)))
    assert read.format == expected.format
    assert same(read.state, expected.state)


@pytest.mark.parametrize(
    "keys",
    [("model",), ("state_dict",), ("model_ema",), ("state_dict_ema",), ("ema",), ("teacher",), ("checkpoint", "net")],
)
def test_wrappers(write, capsys, keys):
    content = SWIN
    for key in reversed(keys):
        content = {key: content}
    path = write({"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, **content})
    assert same(load_encoder(path)[0].state_dict(), SWIN)
    said = capsys.readouterr().out
    assert ("a running average, under" in said) == ("ema" in keys[0])
    assert ("a teacher's, under" in said) == (keys[0] == "teacher")


SETS = {
    "average beside": ({"model_ema": filled(2.0), "model": filled(1.0)}, 1.0, {"model_ema": 2.0, "model": 1.0}),
    "average in it": ({**filled(1.0), "ema": below("module.", filled(2.0))}, 1.0, {"ema": 2.0}),
    "lightning": (
        {"state_dict": below("model.", filled(1.0)) | below("model_ema.", filled(2.0))},
        1.0,
        {"model_ema": 2.0, "state_dict.model": 1.0},
    ),
    "student and teacher": (
        {
            "student": below("module.backbone.", filled(1.0)) | {"module.head.mlp.0.weight": torch.ones(4, 4)},
            "teacher": below("backbone.", filled(2.0)) | {"head.mlp.0.weight": torch.ones(4, 4)},
            "optimizer": below("exp_avg.", filled(9.0)),
        },
        2.0,
        {"student": 1.0, "student.backbone": 1.0, "teacher": 2.0, "backbone": 2.0},
    ),
    "our encoder and an average": (
        below("encoder.", filled(1.0)) | below("ema.encoder.", filled(2.0)),
        1.0,
        {"ema": 2.0},
    ),
    "target encoder": ({"encoder": filled(1.0), "target_encoder": filled(2.0)}, 1.0, {"target_encoder": 2.0}),
}


@pytest.mark.parametrize(("content", "usual", "by_key"), SETS.values(), ids=SETS)
def test_one_of_several_sets(write, capsys, content, usual, by_key):
    path = write(content)
    assert (load_encoder(path)[0].norm.weight == usual).all()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"note: {path}: reading ")
    assert "2 sets of weights" in line
    assert "--weights-key" in line
    for key, value in by_key.items():
        assert (load_encoder(path, key=key)[0].norm.weight == value).all()
    with pytest.raises(ValueError, match=r"has no weights under nothing, but under .*change --weights-key"):
        read_weights(path, key="nothing")


def test_what_is_left_out_is_named(write, capsys):
    read_state_dict(
        write({"model": below("backbone.", SWIN) | {"head.weight": torch.ones(2, 2)}, "epoch": torch.tensor(3)})
    )
    assert "1 other tensors, such as model.head.weight, which are left out" in capsys.readouterr().out


def test_a_plain_file_needs_no_words(write, capsys):
    read_state_dict(write({"model": SWIN, "epoch": torch.tensor(3)}))
    assert capsys.readouterr().out == ""


def test_numbers_at_the_top_are_no_weights(write):
    """torch's AveragedModel writes n_averaged beside the names below module."""
    path = write({"n_averaged": torch.tensor(3), "global_step": torch.tensor(9), **below("module.", SWIN)})
    assert same(load_encoder(path)[0].state_dict(), SWIN)


def test_unknown_names_are_shown(write):
    state = {"state_dict": {"model.conv1.weight": torch.ones(2, 2), "model.bn1.weight": torch.ones(2)}}
    with pytest.raises(
        ValueError, match=r"weights\..*no known format .they start with state_dict.model.(conv|bn)1.weight"
    ):
        read_weights(write(state))
