"""A run whose output is in a store: killed, its machine lost, continued elsewhere while the store is away."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import build_encoder, config_to_json
from mixmae.jobs.config import to_json
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.tracking import Reader
from mixmae.training.checkpoint import save_checkpoint
from mixmae.training.run_folder import weights_of
from mixmae.training.run_store import RunStore
from pipelines.recipes import PRETRAIN_RECIPES
from tests.ray.conftest import ENCODER, TINY, command, environment, interrupt, run
from tests.s3_server import S3Server, serve_s3

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = ["--loop.steps", "160", "--loop.max-broken-fraction", "0.2", "--loop.checkpoint-every-epochs", "3"]


def tensors(place: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    found = dict(safetensors.torch.load_file(place / "model.safetensors"))
    optimizer = torch.load(place / "optimizer.pt", weights_only=True)
    for number, values in optimizer["state"].items():
        found |= {f"{number}.{name}": value for name, value in values.items()}
    return found


def same_command(program: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(program, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200, check=False)


def newest(server: S3Server) -> int:
    """The step of the newest checkpoint in the store."""
    steps = (name.split("/")[1] for name in server.names("photos") if name.endswith("/state.json"))
    return max((int(step.removeprefix("step_")) for step in steps if step.startswith("step_")), default=0)


def test_a_run_in_a_store(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["--data", photos, "--workers", "1", *TINY, *STEPS]
    undisturbed = run("demo", "--output", tmp_path / "runs" / "undisturbed", *arguments, cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    with serve_s3() as server:
        output = server.uri("photos")

        def program(machine: str) -> list[str]:
            return command("demo", "--output", output, "--staging", tmp_path / machine, *arguments)

        status, text = interrupt(program("one"), lambda: newest(server) > 20, how=signal.SIGKILL, cwd=tmp_path)
        assert status == -9, text
        (tmp_path / "one").rename(tmp_path / "lost")
        reached = newest(server)
        assert 20 < reached < 160
        asked = run(output, cwd=tmp_path, pipeline="status")
        assert asked.returncode == 4, asked.stdout + asked.stderr
        assert "state       interrupted; the same command continues" in asked.stdout
        assert f"checkpoint  step_{reached:07d}" in asked.stdout
        assert "all files are there" in asked.stdout

        with subprocess.Popen(
            program("two"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            while newest(server) <= reached:
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.1)
            refused = same_command(program("three"), tmp_path)
            server.stop()
            back = threading.Timer(30, server.start)
            back.start()
            text, _ = process.communicate(timeout=400)
            back.join()
        assert process.returncode == 0, text
        assert "Training goes on; what is to be copied to s3://runs/photos waits in" in text
        assert "s3://runs/photos answers again" in text
        assert "checkpoint  s3://runs/photos/checkpoints/step_0000160" in text
        assert refused.returncode == 1
        assert "s3://runs/photos is in use by" in refused.stderr
        assert f"(process {process.pid})" in refused.stderr

        mine, theirs = tensors(weights_of(Path(output))), tensors(weights_of(tmp_path / "runs" / "undisturbed"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "metrics.jsonl").write_bytes(server.read("photos/metrics.jsonl"))
        seen = Counter(
            (name, entry["step"]) for entry, _ in Reader(tmp_path / "copy").read() for name in entry.get("metrics", {})
        )
        assert set(seen.values()) == {1}
        assert {("train/loss", step) for step in (1, *range(5, 161, 5))} <= seen.keys()
        panels = {path.name for path in (tmp_path / "runs" / "undisturbed" / "panels").iterdir()}
        assert {name.removeprefix("panels/") for name in server.names("photos") if name.startswith("panels/")} == panels
        asked = run(output, "--verify", cwd=tmp_path, pipeline="status")
        assert asked.returncode == 0, asked.stdout + asked.stderr
        assert "verified, all bytes are those that were written" in asked.stdout
        assert "MLflow      0 points are not sent yet" in asked.stdout
        again = same_command(program("four"), tmp_path)
        assert again.returncode == 0, again.stderr
        assert "This run is finished: s3://runs/photos/checkpoints/step_0000160" in again.stdout


def test_finetuning_from_a_store_to_a_store(photos, tmp_path, monkeypatch):
    """Two workers, weights that every node needs, the best ones, Ctrl-C, and another machine that goes on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(3)
    method = MixMAE(
        build_encoder(ENCODER), MixMAEConfig(num_images=2, decoder=DecoderConfig(dim=32, depth=1, num_heads=4))
    )
    config = to_json(PRETRAIN_RECIPES["demo"]())
    config["encoder"] = config_to_json(ENCODER)
    config["augment"]["image_size"] = 64
    state = {"config": config, "position": {"step": 40}, "data": {}, "versions": {}}
    save_checkpoint(tmp_path / "pretrained", model=method, optimizer=None, state=state)
    with serve_s3() as server:
        store = RunStore.of(server.uri("photos"), tmp_path / "staging")
        assert store is not None
        store.write("run.json", b'{"status": "finished"}')
        store.put_folder(tmp_path / "pretrained", "checkpoints/step_0000040")
        output = server.uri("fine")
        arguments = [
            *("--output", output, "--pretrained", server.uri("photos"), "--data", photos, "--workers", "2"),
            *("--augment.image-size", "64", "--loop.batch-size", "16", "--loop.steps", "80"),
            *("--loop.max-broken-fraction", "0.2", "--loop.log-every-steps", "5"),
        ]

        def program(machine: str) -> list[str]:
            return command("demo_finetune", *arguments, "--staging", tmp_path / machine, pipeline="finetune")

        status, text = interrupt(program("one"), lambda: "best/state.json" in server.names("fine"), cwd=tmp_path)
        assert status == 130, text
        (tmp_path / "one").rename(tmp_path / "lost")
        done = same_command(program("two"), tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Continuing demo_finetune" in done.stdout
        assert "best        s3://runs/fine/best" in done.stdout
        names = server.names("fine")
        assert {"initial.safetensors", "best/state.json", "best/model.safetensors", "run.json"} <= names
        record = json.loads(server.read("fine/run.json"))
        assert record["status"] == "finished"
        assert record["checkpoint"] == "s3://runs/fine/checkpoints/step_0000080"
        assert record["pretrained"]["path"] == "s3://runs/photos"
        judged = run(output, "--data", photos, cwd=tmp_path, pipeline="evaluate")
        assert judged.returncode == 0, judged.stdout + judged.stderr
        assert (tmp_path / "evaluations" / "fine" / "metrics.json").exists()
