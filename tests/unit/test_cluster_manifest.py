"""docs/cluster/rayjob.yaml: its command line parses and its node groups hold what it asks for."""

import shlex
from pathlib import Path

import tyro
import yaml

from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES, find_recipe

MANIFEST = Path(__file__).parents[2] / "docs" / "cluster" / "rayjob.yaml"


def _requests(group: dict) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["requests"]


def test_the_entry_point_is_a_valid_command_line_that_the_cluster_can_hold():
    manifest = yaml.safe_load(MANIFEST.read_text())
    python, script, recipe, *rest = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, script) == ("python", "pipelines/pretrain.py")
    arguments = tyro.cli(Arguments, args=rest, default=Arguments(config=find_recipe(recipe, PRETRAIN_RECIPES)()))
    arguments.config.share(num_workers=arguments.workers)
    groups = {group["groupName"]: group for group in manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    gpus = groups["gpu-train"]["replicas"] * int(_requests(groups["gpu-train"])["nvidia.com/gpu"])
    assert gpus == arguments.workers
    assert "nvidia.com/gpu" not in _requests(groups["cpu-decode"])
