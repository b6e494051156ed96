"""What only a GPU can show. Marked gpu: skipped where there is no CUDA device.

python -m pytest -m gpu
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixmae.mixing import draw_group_map
from tests.factories import (
    group_maps,
    noise_images,
    seeded,
    tiny_mixmae,
    tiny_pvt_v2,
    tiny_resnetv2,
    tiny_swin,
    tiny_vit,
)

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("build", [tiny_swin, tiny_vit, tiny_pvt_v2, tiny_resnetv2])
def test_features_are_those_of_the_cpu(build):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    encoder, images, group_map = build().eval(), noise_images(4), group_maps()
    with torch.no_grad():
        expected = encoder(images, group_map)
        found = encoder.cuda()(images.cuda(), group_map.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [tiny_swin, tiny_vit, tiny_pvt_v2, tiny_resnetv2])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_groups_stay_apart_in_fused_attention(build, precision):
    """The kernels of a GPU may not let one bit of another group through."""
    encoder, images = build().cuda().eval(), noise_images(2).cuda()
    group_map = draw_group_map((3, 3), 4, seeded()).cuda()
    pixels = (group_map == 1).repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        before = encoder.features(images, group_map)
        after = encoder.features(images + 5.0 * pixels, group_map)
    for first, second in zip(before, after, strict=True):
        scale = first.shape[2] // 3 if first.shape[2] >= 3 else 1
        own = (group_map == 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None].expand_as(first)
        assert torch.equal(first[~own], second[~own])
        assert not torch.equal(first[own], second[own])


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_training_learns(compiled):
    method = tiny_mixmae(num_images=2).cuda()
    if compiled:
        method.compile()
    images, group_map = (noise_images(4) * 0.1 + torch.linspace(-2, 2, 96)).cuda(), group_maps(num_images=2).cuda()
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = method(images, group_map=group_map).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_demo_trains_on_every_gpu(tmp_path):
    """NCCL where there are several."""
    workers = torch.cuda.device_count()
    command = [sys.executable, "pipelines/pretrain.py", "demo", "--device", "gpu", "--workers", str(workers)]
    command += ["--loop.precision", "bfloat16", "--loop.batch-size", str(16 * workers), "--loop.steps", "60"]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
