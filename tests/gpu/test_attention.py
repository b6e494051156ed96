"""The kernels of training, with their gradients. Marked gpu: skipped where there is no CUDA device.

python -m pytest -m gpu -k "not demo" tests/gpu

test_cuda.py looks at outputs without a gradient, for which torch chooses other kernels than for training.
"""

import pytest
import torch

from mixmae.layers.attention import attend
from mixmae.layers.windows import WindowAttention, plan_sorted, plan_windows
from mixmae.mixing import draw_group_map, group_sizes, upsample_group_map
from tests.factories import noise_images, seeded, tiny_mixmae, tiny_pvt_v2, tiny_swin, tiny_vit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STAGES = [(56, 4, 128, 4), (28, 4, 256, 8), (14, 4, 512, 16), (7, 4, 1024, 32), (14, 2, 512, 16)]
"""Side of the grid, K, width and heads of Swin-B at 224 px; windows of 14, and of 7 in the last stage."""


def stage(side, num_images, dim, heads, num_maps=1):
    """A block's attention, its input, and the plans: masked, and sorted where there is one."""
    torch.manual_seed(0)
    window = min(side, 14)
    attention = WindowAttention(dim, heads, window)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    cells = draw_group_map((7, 7), num_images, seeded(), num_maps)
    sizes = [count * (side // 7) ** 2 for count in group_sizes(cells)]
    groups = upsample_group_map(cells, (side, side)).cuda()
    return (
        attention,
        torch.randn(2, side, side, dim),
        plan_windows((side, side), window, groups),
        plan_sorted(groups, sizes, window),
    )


def outputs_and_gradients(attention, x, work):
    x = x.requires_grad_(True)
    read = work(x)
    weight = torch.linspace(-1, 1, read.shape[-1], device=x.device)
    gradients = torch.autograd.grad((read.float() * weight).sum(), [x, *attention.parameters()])
    return [read.detach(), *gradients]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_maps", [1, 2])
@pytest.mark.parametrize("size", STAGES)
def test_training_attention_and_its_gradients(size, num_maps, precision):
    torch.backends.cuda.matmul.allow_tf32 = False
    attention, x, masked, by_group = stage(*size, num_maps=num_maps)
    attention, x = attention.cuda(), x.cuda()
    expected = outputs_and_gradients(attention.double(), x.double(), lambda x: attention(x, masked))
    attention.float()
    ways = {"masked": lambda x: attention(x, masked)}
    if by_group is not None:
        ways["sorted"] = lambda x: by_group.unsort(attention(by_group.sort(x), by_group))
    for name, work in ways.items():
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
            found = outputs_and_gradients(attention, x, work)
        for one, two in zip(found, expected, strict=True):
            error = float((one.double() - two).norm() / two.norm())
            assert error < (2e-2 if precision == torch.bfloat16 else 1e-5), (name, tuple(two.shape), error)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_swin, tiny_vit, tiny_pvt_v2])
def test_no_gradient_reaches_another_group(build, precision):
    """With gradients on, that is with training's kernels: exactly zero for the pixels of other groups."""
    encoder, images = build().cuda(), noise_images(2).cuda().requires_grad_(True)
    group_map = draw_group_map((3, 3), 4, seeded()).cuda()
    pixels = (group_map == 1).repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        features = encoder.features(images, group_map)
    for feature in features:
        scale = feature.shape[2] // 3 if feature.shape[2] >= 3 else 1
        own = (group_map == 1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None]
        # Weighted, or a last norm leaves a gradient of zero: what it gives adds up to a constant.
        weight = torch.linspace(-1, 1, feature.shape[1], device="cuda")[:, None, None]
        (gradient,) = torch.autograd.grad((feature.float() * own * weight).sum(), images, retain_graph=True)
        assert gradient.isfinite().all()
        assert not (gradient * ~pixels).any()
        assert (gradient * pixels).any()


@pytest.mark.parametrize("build", [tiny_swin, tiny_vit, tiny_pvt_v2])
def test_evaluation_is_what_was_trained(build):
    """Without gradients torch takes other kernels: the same features, up to the rounding of bfloat16."""
    encoder, images, group_map = build().cuda(), noise_images(4).cuda(), draw_group_map((3, 3), 4, seeded()).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        trained = encoder(images, group_map)
        with torch.no_grad():
            evaluated = encoder(images, group_map)
    assert float((trained.detach() - evaluated).norm() / evaluated.norm()) < 1e-2


def test_a_mask_with_low_scores_gives_finite_gradients():
    """Rows whose scores are all below -88, T % 128 = 64, a bool mask: cuDNN returns NaN there (pytorch #196678)."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 64, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    query, key = (query.abs() * 20).requires_grad_(True), (-key.abs() * 20).requires_grad_(True)
    mask = torch.eye(64, device="cuda", dtype=torch.bool) | (torch.rand(1, 1, 64, 64, device="cuda") < 0.3)
    attend(query, key, value, mask).sum().backward()
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_images", [2, 4])
def test_compiled_it_is_the_eager_model(num_images, precision):
    """With draws in between, loss and gradients; biases of 144, 49, 36 and 9 columns, which kernels want aligned.

    In bfloat16 each rounds at other places, so both are held against float32: compiled may be no further from it.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    eager, compiled = (tiny_mixmae(num_images=num_images).cuda() for _ in range(2))
    compiled.compile()
    images = noise_images(8).cuda()

    def step(method, seed, dtype):
        method.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = method(images, generator=seeded(seed)).loss
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten() for parameter in method.parameters()])

    for seed in range(3):
        exact_loss, exact = step(eager, seed, torch.float32)
        loss, found = step(compiled, seed, precision)
        allowed = 1e-4
        if precision == torch.bfloat16:
            allowed = 2 * float((step(eager, seed, precision)[1] - exact).norm() / exact.norm())
        assert loss == pytest.approx(exact_loss, rel=1e-2 if precision == torch.bfloat16 else 1e-5)
        assert float((found - exact).norm() / exact.norm()) < allowed


def test_deterministic_steps_repeat_their_bits(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            method, images = tiny_mixmae().cuda(), noise_images(8).cuda()
            optimiser = torch.optim.AdamW(method.parameters(), lr=1e-3, fused=True)
            for seed in range(5):
                optimiser.zero_grad()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = method(images, generator=seeded(seed)).loss
                loss.backward()
                optimiser.step()
            runs.append([parameter.detach().clone() for parameter in method.parameters()])
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_step_makes_the_host_wait_for_nothing():
    method, images = tiny_mixmae().cuda(), noise_images(8).pin_memory()
    method(images.cuda(), generator=seeded()).loss.backward()  # the first step may
    torch.cuda.set_sync_debug_mode("error")
    try:
        method(images.to("cuda", non_blocking=True), generator=seeded(1)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
