"""Files are opened by what is in them, whatever their suffix, and what is no file of weights is called by its name."""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from mixmae.convert import load_encoder, read_state_dict, read_weights
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.ema import WeightAverage
from tests.factories import same, tiny_swin

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 354400320\n"
PAGE = "\ufeff\n<!DOCTYPE html>\n<html lang='de'><title>Zugriff verweigert für dich</title>".encode()


def torch_bytes(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def numpy_bytes(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer, np.ones(3))
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weights/readme.txt", "hello")
    return buffer.getvalue()


def script_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


STATE = {f"encoder.{name}": value for name, value in tiny_swin().state_dict().items()}
OTHERS = {
    "pointer": (lambda: POINTER, "is a git-lfs pointer.*git lfs pull"),
    "page": (lambda: PAGE, "is a web page.*download the file itself"),
    "page in capitals": (lambda: b"<HTML><BODY>404", "is a web page"),
    "answer in JSON": (lambda: b'{"error":"Repository not found"}', "is a text file"),
    "text": (lambda: b"not a checkpoint at all", "is a text file"),
    "nothing": (lambda: b"", "is empty"),
    "npy": (lambda: numpy_bytes(np.save), "is a numpy array"),
    "npz": (lambda: numpy_bytes(np.savez), "is a zip archive .of arr_0.npy., not weights"),
    "zip": (zip_bytes, "is a zip archive .of readme.txt., not weights"),
    "gzip": (lambda: gzip.compress(save(STATE)), "is compressed: unpack it"),
    "TorchScript": (script_bytes, "is a TorchScript program: save the state_dict"),
    "noise": (lambda: bytes(range(256)) * 4, "damaged"),
    "half a torch file": (lambda: torch_bytes(STATE)[:100_000], "damaged or cut short"),
    "half a safetensors file": (lambda: save(STATE)[:100_000], "damaged or cut short"),
    "the start of a safetensors file": (lambda: save(STATE)[:100], "damaged or cut short"),
    "a list": (lambda: torch_bytes([1, 2]), "holds no weights by name, but a list"),
    "a tensor": (lambda: torch_bytes(torch.ones(3)), "holds no weights by name, but a Tensor"),
    "no tensors": (
        lambda: torch_bytes({"epoch": 3, "args": {"lr": 1.0}}),
        "holds no weights; its keys are epoch, args",
    ),
    "an optimizer": (lambda: torch_bytes({"optimizer": {"state": {0: {"exp": torch.ones(2)}}}}), "keys are optimizer"),
    "an empty dict": (lambda: torch_bytes({}), "holds no weights; it is empty"),
    "a pickle of numpy": (
        lambda: torch_bytes({"norm.weight": np.ones(3)}),
        "contains more than .*.numpy.*, which could",
    ),
    "a module": (lambda: torch_bytes(tiny_swin()), r"contains more than tensors .*SwinEncoder.*the weights alone"),
    "empty safetensors": (lambda: save({}), "holds no weights; it is empty"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("content", "sentence"), OTHERS.values(), ids=OTHERS)
def test_what_is_not_weights_is_called_by_its_name(tmp_path, content, sentence, suffix):
    file = tmp_path / f"file.{suffix}"
    file.write_bytes(content())
    with pytest.raises(ValueError, match=f"{file.name} .*{sentence}") as caught:
        read_weights(file)
    assert "\n" not in str(caught.value)


def test_suffixes_do_not_count(tmp_path):
    (tmp_path / "torch.safetensors").write_bytes(torch_bytes(STATE))
    (tmp_path / "safe.pth").write_bytes(save(STATE))
    for name in ("torch.safetensors", "safe.pth"):
        assert same(read_state_dict(tmp_path / name), STATE)


@pytest.mark.parametrize("beginning", [b"\x80\x02", b"PK", b"\x1f\x8b", b"BZ", b"<h"])
def test_a_safetensors_file_may_begin_like_another(tmp_path, beginning):
    """Its first bytes are a length: that of the header, which may be padded."""
    content = save(STATE)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()
    length = next(n for n in range(len(header), 2**17) if n.to_bytes(8, "little").startswith(beginning))
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    (tmp_path / "any.pth").write_bytes(length.to_bytes(8, "little") + header.ljust(length) + tensors)
    assert same(read_state_dict(tmp_path / "any.pth"), STATE)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_spread_over_files(tmp_path, name):
    names = sorted(STATE)
    stem, suffix = name.split(".")
    files = [f"{stem}-0000{part}-of-00002.{suffix}" for part in (1, 2)]
    for part, file in enumerate(files):
        state = {key: STATE[key] for key in names[part::2]}
        (tmp_path / file).write_bytes(save(state) if suffix == "safetensors" else torch_bytes(state))
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: files[i % 2] for i, key in enumerate(names)}}))
    assert same(load_encoder(tmp_path)[0].state_dict(), tiny_swin().state_dict())
    assert same(read_state_dict(index), STATE)
    (tmp_path / files[1]).write_bytes(POINTER)
    with pytest.raises(ValueError, match=rf"{files[1]} is a git-lfs pointer"):
        read_weights(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=f"names 2 files, of which {files[1]} is not there"):
        read_weights(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="does not say which files hold the weights"):
        read_weights(tmp_path)


def test_folders(tmp_path):
    """The only file of weights in one is read, and of several one must be named; a pointer is called that."""
    save_file(STATE, tmp_path / "swin.safetensors")
    (tmp_path / "README.md").write_text("a card")
    assert same(read_state_dict(tmp_path), STATE)
    save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"folder without model.safetensors: name one of its files.*other.safetensors"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"model.safetensors is a git-lfs pointer"):
        read_weights(tmp_path)


def test_the_running_average_of_a_run(tmp_path, capsys):
    model = tiny_swin()
    average = WeightAverage(model)
    with torch.no_grad():
        model.norm.weight.fill_(5.0)
    save_checkpoint(tmp_path / "step_1", model=model, optimizer=None, average=average, state={})
    assert (load_encoder(tmp_path / "step_1")[0].norm.weight == 5).all()
    assert "reading the trained weights, under model; the file has 2 sets" in capsys.readouterr().out
    assert (load_encoder(tmp_path / "step_1", key="average")[0].norm.weight == 1).all()
