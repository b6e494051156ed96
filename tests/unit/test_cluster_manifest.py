"""docs/cluster/rayjob.yaml: its command line parses and its node groups hold what it asks for."""

import shlex
from pathlib import Path

import tyro
import yaml
from ray._private import ray_constants
from ray.dashboard import http_server_agent

from pipelines.pretrain import Arguments
from pipelines.recipes import PRETRAIN_RECIPES, find_recipe

MANIFEST = Path(__file__).parents[2] / "docs" / "cluster" / "rayjob.yaml"


def _containers(manifest: dict) -> dict[str, dict]:
    """The container of each group, by the group's name."""
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


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


def test_every_pod_sees_the_shared_folder_and_is_probed_where_ray_answers_without_a_token():
    manifest = yaml.safe_load(MANIFEST.read_text())
    arguments = shlex.split(manifest["spec"]["entrypoint"])
    public = http_server_agent.PUBLIC_EXACT_PATHS
    for name, container in _containers(manifest).items():
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/shared", "/dev/shm"} <= mounts, name
        for probe in ("readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["path"] in public, name
            assert asked["port"] == ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, name
    for flag in ("--data", "--output"):
        assert arguments[arguments.index(flag) + 1].startswith("/shared/")


def test_the_token_is_in_a_secret_and_nowhere_else():
    text = MANIFEST.read_text()
    auth = yaml.safe_load(text)["spec"]["rayClusterSpec"]["authOptions"]
    assert auth["mode"] == "token"
    assert f"create secret generic {auth['secretName']} --from-literal=auth_token=" in text
    assert "RAY_AUTH_TOKEN" not in text


def test_preemptible_nodes_only_decode():
    groups = yaml.safe_load(MANIFEST.read_text())["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spot = [group for group in groups if "nodeSelector" in group["template"]["spec"]]
    assert [group["groupName"] for group in spot] == ["cpu-decode-preemptible"]
    (group,) = spot
    selected = group["template"]["spec"]["nodeSelector"]
    tolerated = {item["key"]: item["value"] for item in group["template"]["spec"]["tolerations"]}
    assert tolerated == selected
    assert "nvidia.com/gpu" not in _requests(group)
