"""The arrow of imports (CONTRIBUTING.md), read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS = {
    room: level
    for level, rooms in enumerate(
        [
            ("pipelines",),
            ("tune_spaces",),
            ("mixmae.jobs",),
            ("mixmae.inference", "mixmae.timm_models"),
            ("mixmae.convert",),
            ("mixmae.cost", "mixmae.flops"),
            ("mixmae.probing",),
            (
                "mixmae.finetune",
                "mixmae.segmentation",
                "mixmae.detection",
                "mixmae.methods",
                "mixmae.training",
                "mixmae.data",
                "mixmae.tracking",
            ),
            ("mixmae.encoders", "mixmae.decoders"),
            ("mixmae.layers",),
        ]
    )
    for room in rooms
}
"""A module may import those of a higher level than its own; on one level only its own room."""
ANYONE = {
    "mixmae",
    *(
        f"mixmae.{name}"
        for name in (
            "lock",
            "machine",
            "masking",
            "metrics",
            "mixing",
            "objects",
            "panels",
            "patches",
            "pixels",
            "share",
            "step",
            "stores",
            "writing",
        )
    ),
}
RAY_ALLOWED = ("mixmae/data/streams.py", "mixmae/training/", "pipelines/", "tune_spaces/")
SOURCES = sorted(path for folder in ("mixmae", "pipelines", "tune_spaces") for path in (ROOT / folder).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "mixmae" else ".".join(parts[:2])


def test_there_is_something_to_check():
    assert len(SOURCES) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrow(path):
    relative = path.relative_to(ROOT)
    room = _room(".".join(relative.with_suffix("").parts))
    for name in _imported(path):
        if name.split(".")[0] not in ("mixmae", "pipelines", "tune_spaces"):
            continue
        target = _room(name)
        if target == room or target in ANYONE:
            continue
        assert room not in ANYONE, f"{relative} is for anyone, so it may not import {name}"
        assert LEVELS[room] < LEVELS[target], f"{relative} may not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_and_mlflow_stay_in_their_rooms(path):
    relative = str(path.relative_to(ROOT))
    tops = {name.split(".")[0] for name in _imported(path)}
    if not relative.startswith(RAY_ALLOWED):
        assert "ray" not in tops
    if not relative.startswith("mixmae/tracking/"):
        assert "mlflow" not in tops


def test_importing_the_library_loads_neither_ray_nor_mlflow():
    modules = "sys, mixmae, mixmae.training.loop, mixmae.tracking, mixmae.timm_models"
    code = f"import {modules}; print({{'ray', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("pipeline", ["stats", "make_shards", "status", "doctor"])
def test_help_of_what_needs_no_model_loads_no_torch(pipeline):
    help_then_print = f"""
import contextlib, sys
from pipelines import {pipeline}
with contextlib.suppress(SystemExit):
    {pipeline}.main(["--help"])
print({{"ray", "mlflow", "torch"}} & set(sys.modules))
"""
    command = [sys.executable, "-c", help_then_print]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert f"{pipeline}.py" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_ray_and_mlflow_load_only_when_a_run_needs_them():
    pipelines = "pretrain, finetune, linear_probe, knn, embed, evaluate, predict, export, compare"
    code = f"import sys; from pipelines import {pipelines}; print({{'ray', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
