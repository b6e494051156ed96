"""Ways to keep attention inside the images of a mix: what each costs in each stage, forward and backward.

    python benchmarks/attention.py                                            # Swin-B's stages at 8 mixes: 2 minutes
    python benchmarks/attention.py --encoder demo --batch 32
    python benchmarks/attention.py --device cuda --batch 128 --precision bfloat16 --check --dispatch

Variants of one block's attention, with its two linear layers:

    linear      the linear layers alone, to be taken off the others
    per_sample  explicit scores and a mask for every sample (plain_mixmae.py)
    torch       masked, by torch's scaled_dot_product_attention, which chooses the kernel
    masked      masked, as ours where windows are cut
    detached    the same without a gradient of the bias: what that gradient costs
    sorted      ours: a dense block per group of a window, groups of one size together
    split       the same with a call per group
    padded      the same with all groups padded to the largest and one call
    flex        torch's FlexAttention, on a GPU

--check compares outputs and gradients with float64 on the CPU, and bits between two runs. On a GPU, milliseconds are of
the kernels, whatever the host takes to start them. The last line is JSON: milliseconds by stage, K and variant, the
linear layers taken off.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/attention.py`

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain_mixmae import PlainAttention
from benchmarks.step_arm import DEMO
from mixmae.encoders.build import SIZES
from mixmae.encoders.swin import SwinConfig
from mixmae.layers import windows
from mixmae.layers.positions import relative_position_bias
from mixmae.layers.windows import SortedPlan, WindowAttention, plan_sorted, plan_windows
from mixmae.mixing import draw_group_map, group_sizes, upsample_group_map

VARIANTS = ("linear", "per_sample", "torch", "masked", "detached", "sorted", "split", "padded", "flex")


def build(
    config: SwinConfig, stage: int, num_images: int, batch: int, device: torch.device
) -> tuple[WindowAttention, Tensor, dict[str, Callable[[Tensor], Tensor]]]:
    """A block's attention, an input of it (B, H, W, C), and the variants that there are, each of the input."""
    torch.manual_seed(0)
    side, last = (config.image_sides[0] // config.strides[index] for index in (stage, -1))
    dim, heads, window = config.channels[stage], config.num_heads[stage], config.window_sizes[stage]
    attention = WindowAttention(dim, heads, window).to(device)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    cells = draw_group_map((last, last), num_images, torch.Generator().manual_seed(1))
    groups = upsample_group_map(cells, (side, side)).to(device)
    sizes = [count * (side // last) ** 2 for count in group_sizes(cells)]
    plain = PlainAttention(dim, heads, window).to(device)
    for name in ("qkv", "proj", "relative_position_bias_table"):
        setattr(plain, name, getattr(attention, name))
    masked = plan_windows((side, side), window, groups)

    def detached(x: Tensor) -> Tensor:
        table = attention.relative_position_bias_table
        assert table is not None
        table.requires_grad_(False)
        read = attention(x, masked)
        table.requires_grad_(True)
        return read

    def by_torch(x: Tensor) -> Tensor:
        with mock.patch.object(windows, "attend", lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias)):
            return attention(x, masked)

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: attention.proj(attention.qkv(x)[..., :dim]),
        "per_sample": lambda x: plain(x, groups.expand(len(x), -1, -1)),
        "torch": by_torch,
        "masked": lambda x: attention(x, masked),
        "detached": detached,
    }
    with mock.patch.object(windows, "_sorting_pays", return_value=True):
        together, split = (plan_sorted(groups, sizes, window, together=way) for way in (True, False))
    if together is not None and split is not None:
        found["sorted"] = lambda x: together.unsort(attention(together.sort(x), together))
        found["split"] = lambda x: split.unsort(attention(split.sort(x), split))
    if split is not None and window >= side:
        found["padded"] = lambda x: padded(attention, x, split, sizes)
    if device.type == "cuda":
        found["flex"] = _flex(attention, masked.num_windows, masked.window, groups)
    return attention, torch.randn(batch, side, side, dim, device=device, requires_grad=True), found


def padded(attention: WindowAttention, x: Tensor, plan: SortedPlan, sizes: list[int]) -> Tensor:
    """Groups as rows of one batch, filled up with tokens that nobody reads."""
    assert attention.relative_position_bias_table is not None
    batch, heads, widest = len(x), attention.num_heads, sizes[0]
    places = torch.full((len(sizes), widest), -1, device=x.device)
    for row, part in enumerate(plan.order[0].split(sizes)):
        places[row, : len(part)] = part
    is_real = places >= 0
    rows, columns = places.clamp(min=0) // x.shape[2], places.clamp(min=0) % x.shape[2]
    window = round(len(attention.relative_position_bias_table) ** 0.5 + 1) // 2
    down, right = (each[:, :, None] - each[:, None] + window - 1 for each in (rows, columns))
    bias = F.embedding(down * (2 * window - 1) + right, attention.relative_position_bias_table).permute(0, 3, 1, 2)
    bias = bias.masked_fill(~is_real[:, None, None, :], float("-inf"))  # (K, N, T, T)
    tokens = x.flatten(1, 2).index_select(1, places.clamp(min=0).flatten())  # (B, K*T, C)
    qkv = attention.qkv(tokens).view(batch, len(sizes), widest, 3, heads, -1).permute(3, 0, 1, 4, 2, 5)
    query, key, value = qkv.flatten(2, 3).unbind(0)
    read = windows.attend(query, key, value, bias.flatten(0, 1)[None].to(query.dtype))
    read = read.unflatten(1, (len(sizes), heads)).transpose(2, 3).reshape(batch, len(sizes) * widest, -1)
    read = attention.proj(read)[:, is_real.flatten()]
    return read.index_select(1, plan.places[0]).view(x.shape)


def _flex(attention: WindowAttention, num_windows: Any, window: Any, groups: Tensor) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (down, across), (rows, columns), heads = num_windows, window, attention.num_heads
    length = rows * columns
    own = groups.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, length)
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = create_block_mask(
        lambda b, h, i, j: own[b % len(own), i] == own[b % len(own), j],
        len(own),
        None,
        length,
        length,
        device=str(groups.device),
    )

    def run(x: Tensor) -> Tensor:
        batch, dim = len(x), x.shape[-1]
        assert attention.relative_position_bias_table is not None
        bias = relative_position_bias(attention.relative_position_bias_table, window)
        qkv = attention.qkv(x).view(batch, down, rows, across, columns, 3, heads, -1).permute(5, 0, 1, 3, 6, 2, 4, 7)
        query, key, value = qkv.reshape(3, batch * len(own), heads, length, -1).unbind(0)
        read = compiled(query, key, value, lambda score, b, h, i, j: score + bias[h, i, j], block_mask=block_mask)
        read = read.view(batch, down, across, heads, rows, columns, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return attention.proj(read.reshape(batch, down * rows, across * columns, dim))

    return run


class Timer:
    """Seconds of work on a device."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self._device = device
        self._clock = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        if self._device.type == "cuda":
            return sum(event.self_device_time_total for event in kernels(work)) / 1e6
        start = self._clock()
        work()
        return self._clock() - start


def gradients(attention: WindowAttention, x: Tensor, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output, and the gradients of the input and of all parameters."""
    attention.zero_grad()
    read = work(x)
    (read.float() * torch.linspace(-1, 1, read.shape[-1], device=read.device)).sum().backward()
    found = [read.detach(), x.grad, *(weight.grad for weight in attention.parameters())]
    x.grad = None
    return [value.detach().clone() for value in found if value is not None]


def check(options: argparse.Namespace, config: SwinConfig, stage: int, images: int, autocast: Any) -> None:
    """Print how far each variant is from masked attention in float64 on the CPU, and whether it repeats its bits."""
    device = torch.device(options.device)
    attention, x, variants = build(config, stage, images, 2, device)
    exact, _, exact_variants = build(config, stage, images, 2, torch.device("cpu"))
    exact.load_state_dict(copy.deepcopy(attention.state_dict()))
    exact.double()
    truth = gradients(exact, x.detach().cpu().double().requires_grad_(True), exact_variants["masked"])
    for name, work in variants.items():
        if name in ("linear", "detached"):
            continue
        with autocast:
            found, again = (gradients(attention, x, work) for _ in range(2))
        far = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        print(f"stage {stage + 1} K {images} {name:10} relative error {max(far):.1e}, repeats its bits: {same}")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--encoder", default="swin_base", help="demo, or a Swin without shifts of mixmae.encoders")
    add("--batch", type=int, default=8)
    add("--images", type=int, nargs="+", default=[2, 4], help="K: images of a mix")
    add("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--rounds", type=int, default=7)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--precision", default="float32", choices=("float32", "bfloat16"))
    add("--clock", default="wall", choices=("wall", "cpu"))
    add("--threads", type=int, default=1)
    add("--check", action="store_true")
    add("--dispatch", action="store_true", help="the kernels of each variant, on a GPU")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config = DEMO[0] if options.encoder == "demo" else SIZES[options.encoder]()
    assert isinstance(config, SwinConfig)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
    timer = Timer(device, options.clock)
    report: dict[str, dict[str, float]] = {}
    for stage in (number - 1 for number in options.stages if number <= len(config.depths)):
        for images in options.images:
            if options.check:
                check(options, config, stage, images, autocast)
            attention, x, variants = build(config, stage, images, options.batch, device)
            chosen = {name: work for name, work in variants.items() if name in ("linear", *options.variants)}
            took: dict[str, list[float]] = {name: [] for name in chosen}
            for number in range(options.rounds + 1):
                for name, work in chosen.items():
                    with autocast:
                        seconds = timer(partial(gradients, attention, x, work))
                    if number:  # the first one warms up
                        took[name].append(seconds)
            medians = {name: 1e3 * statistics.median(values) for name, values in took.items()}
            row = {name: round(value - medians["linear"], 2) for name, value in medians.items() if name != "linear"}
            report[f"stage{stage + 1}_k{images}"] = row
            cells = " ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(
                f"stage {stage + 1} K {images}: ms beside {medians['linear']:.2f} of the linear layers: {cells}",
                flush=True,
            )
            if options.dispatch and device.type == "cuda":
                for name, work in chosen.items():
                    with autocast:
                        names = {event.name for event in kernels(partial(gradients, attention, x, work))}
                    words = ("attention", "fmha", "flash", "softmax")
                    print(f"  {name}:", sorted(each[:60] for each in names if any(word in each for word in words)))
    print(json.dumps(report))
    return 0


def kernels(work: Callable[[], object]) -> list[Any]:
    """What a GPU does during some work, as the profiler's events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]


if __name__ == "__main__":
    sys.exit(main())
