"""One arm of step.py: a model in a process of its own, which trains when it is told to.

It reads commands from stdin, one per line, and answers each with one line of JSON:
    train N     N steps: seconds per step, of the whole and of its parts, and the loss of the last one
    products    all matrix products of a step, each alone at its own shape: seconds, FLOPs
    memory      bytes at the peak, beyond what the process had before the model was built
    check       ours beside the plain model, or compiled beside eager: relative differences of the loss and gradients
    kernels     on a GPU: seconds of a step's kernels and copies, and how many they are
    profile     the operations (on a GPU the kernels) that take longest, as lines of text
    syncs       on a GPU: the places where the host waits for it
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the plain model is of this commit
sys.path.insert(0, os.environ.get("STEP_ROOT", str(Path(__file__).parents[1])))  # an arm may be another one

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixmae.decoders import DecoderConfig
from mixmae.encoders.build import SIZES, build_encoder
from mixmae.encoders.swin import SwinConfig
from mixmae.finetune.classification import ImageClassifier, classification_step
from mixmae.methods.mixmae import MixMAE, MixMAEConfig
from mixmae.methods.simmim import SimMIM, SimMIMConfig
from mixmae.mixing import cyclic_partners, draw_group_map
from mixmae.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from mixmae.training.loop import LoopConfig, Silent, TrainState, train
from mixmae.training.optim import OptimConfig, build_optimizer
from mixmae.training.schedule import RunLength

NUM_CLASSES = 1000
DEMO = (
    SwinConfig(image_size=64, patch_px=4, embed_dim=32, depths=(1, 1, 2), num_heads=(1, 2, 4), window_sizes=(8, 8, 4)),
    DecoderConfig(dim=64, depth=1, num_heads=2),
)
"""Encoder and decoder of pipelines/recipes/demo.py."""


@dataclass(frozen=True)
class Spec:
    """What an arm trains."""

    root: str
    code: str = "ours"
    """ours, plain (plain_mixmae.py) or timm."""
    task: str = "mixmae"
    """mixmae, simmim or finetune."""
    encoder: str = "demo"
    batch: int = 32
    images: int = 4
    pairing: str = "all"
    compiled: str = ""
    """blocks, as --loop.compile does it, or model: as one graph."""
    precision: str = "float32"
    device: str = "cpu"
    threads: int = 1
    clock: str = "wall"
    """wall or cpu: by which matrix products are timed."""
    recompute: tuple[int, ...] = ()
    """Stages that keep only the inputs of their blocks."""
    input: str = "plain"
    """plain, pinned or device: where the uint8 images are."""


class Arm:
    """The model of a Spec and its steps."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.device = spec, torch.device(spec.device)
        torch.set_num_threads(spec.threads)
        torch.manual_seed(0)
        self.before = _resident_bytes()
        encoder, decoder = DEMO if spec.encoder == "demo" else (SIZES[spec.encoder](), DecoderConfig())
        assert isinstance(encoder, SwinConfig)
        self.size = encoder.image_sides
        self.model = self._build(encoder, decoder).to(self.device)
        if spec.compiled == "blocks":
            from mixmae.training.compile import compile_blocks  # an older commit has none

            compile_blocks(self.model, torch.device("cuda"))
        elif spec.compiled:
            self.model.compile(dynamic=False)
        if spec.recompute:
            from mixmae.training.recompute import recompute_stages  # an older commit has none

            recompute_stages(self.model, spec.recompute)
        optim = OptimConfig(base_lr=1e-4)
        if spec.code == "ours":
            self.optimizer = build_optimizer(self.model, optim)
        else:  # as the official code makes it
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=optim.betas, weight_decay=0.05)
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (spec.batch, 3, *self.size), dtype=torch.uint8, generator=generator)
        self.images = images.pin_memory() if spec.input == "pinned" else images
        self.images = images.to(self.device) if spec.input == "device" else self.images
        self.labels = torch.randint(NUM_CLASSES, (spec.batch,), generator=generator)
        self.marks: list[list[Any]] = []
        self.start = 0.0, 0.0
        self.optimizer.register_step_pre_hook(lambda *_: self._mark())
        self.optimizer.register_step_post_hook(lambda *_: self._mark())
        self.loss = torch.zeros(())

    def _build(self, encoder: SwinConfig, decoder: DecoderConfig) -> nn.Module:
        spec = self.spec
        if spec.code == "timm":
            from timm.models.swin_transformer import SwinTransformer

            return SwinTransformer(
                img_size=self.size,
                patch_size=encoder.patch_px,
                num_classes=NUM_CLASSES,
                embed_dim=encoder.embed_dim,
                depths=encoder.depths,
                num_heads=encoder.num_heads,
                window_size=max(encoder.window_sizes),
                drop_path_rate=0.0,
            )
        if spec.code == "plain":
            from plain_mixmae import PlainMixMAE  # of this folder, whatever commit the rest is

            return PlainMixMAE(encoder, decoder, spec.images)
        if spec.task == "finetune":
            return ImageClassifier(build_encoder(encoder), NUM_CLASSES)
        if spec.task == "simmim":
            return SimMIM(build_encoder(encoder), SimMIMConfig())
        config = MixMAEConfig(num_images=spec.images, pairing=spec.pairing, decoder=decoder)  # type: ignore[arg-type]
        return MixMAE(build_encoder(encoder), config)

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks[-1].append(event)
        else:
            self.marks[-1].append(time.perf_counter())

    def forward(self, generator: torch.Generator, first_sample: int = 0) -> Any:
        """The step's output; .loss is its loss."""
        if not self.marks:  # what the loop does once is not part of a step
            self.start = time.perf_counter(), time.process_time()
        self.marks.append([])
        self._mark()
        images = self.images.to(self.device, non_blocking=True)
        images = normalise(images, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        output: Any
        if self.spec.task == "finetune":
            output = classification_step(self.model, images, self.labels, generator, first_sample, label_smoothing=0.1)
        elif self.spec.code == "plain":
            stride = self.size[0] // self.model.grid[0]
            cells = (self.size[0] // stride, self.size[1] // stride)
            group_map = draw_group_map(cells, self.spec.images, generator).to(self.device)
            partners = cyclic_partners(len(images), self.spec.images).to(self.device)
            output = SimpleNamespace(loss=self.model(images, group_map, partners), metrics={})
        else:
            output = self.model(images, generator=generator, first_sample=first_sample)
        self._mark()
        self.loss = output.loss.detach()
        return output

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.spec.precision == "bfloat16")

    def steps(self, count: int) -> None:
        """Train some steps: ours in our loop, the others in the bare one of the official code."""
        if self.spec.code == "ours":
            config = LoopConfig(
                steps=count,
                batch_size=self.spec.batch,
                precision=self.spec.precision,  # type: ignore[arg-type]
                log_every_steps=10**6,
                evaluate_every_epochs=10**6,
                checkpoint_every_epochs=10**6,
            )
            train(
                model=self.model,
                optimizer=self.optimizer,
                peak_lr=1e-4,
                clip_grad_norm=None,
                step_function=lambda model, batch, generator, first: self.forward(generator, first),
                batches=repeat(SimpleNamespace(images=self.images, broken=())),
                state=TrainState(),
                config=config,
                length=RunLength(total_steps=count, warmup_steps=0, steps_per_epoch=10**6),
                events=Silent(),
                device=self.device,
            )
            return
        for step in range(count):
            with self.autocast():
                output = self.forward(torch.Generator().manual_seed(step))
            output.loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)  # the official code's way to the norm
            self.optimizer.step()
            self.optimizer.zero_grad()

    def train(self, count: int) -> dict[str, Any]:
        self.marks = []
        self._wait()
        self.steps(count)
        self._wait()
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        parts = zip(*([self._between(*pair) for pair in pairwise(marks)] for marks in self.marks), strict=True)
        forward, backward, optimizer = (sum(values) / count for values in parts)
        return {
            "wall_s": wall / count,
            "cpu_s": cpu / count,
            "forward_s": forward,
            "backward_s": backward,
            "optimizer_s": optimizer,
            "loss": self.loss.item(),
        }

    def _between(self, one: Any, two: Any) -> float:
        return two - one if isinstance(one, float) else one.elapsed_time(two) / 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradients(self, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one step, by name."""
        self.model.zero_grad()
        with self.autocast():
            output = self.forward(torch.Generator().manual_seed(seed))
        output.loss.backward()
        found = {name: weight.grad.clone() for name, weight in self.model.named_parameters() if weight.grad is not None}
        self.model.zero_grad()
        return output.loss.item(), found

    def check(self) -> dict[str, Any]:
        """This arm beside a plain or, if it is compiled, an eager one, with the same weights."""
        other = Arm(dataclasses.replace(self.spec, **({"compiled": ""} if self.spec.compiled else {"code": "plain"})))
        other.model.load_state_dict(self.model.state_dict())
        (loss, found), (other_loss, expected) = self.gradients(), other.gradients()
        worst = max((float((found[name] - value).norm() / value.norm()), name) for name, value in expected.items())
        return {"loss": abs(loss / other_loss - 1), "gradient": worst[0], "worst": worst[1]}

    def memory(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            return {"bytes": torch.cuda.max_memory_allocated()}
        return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.before}

    def products(self) -> dict[str, Any]:
        if not hasattr(self, "recorded"):
            self.recorded = _Products()
            with self.recorded:
                self.gradients()
        seconds = flops = layer_seconds = 0.0
        for (is_layer, one, two), count in self.recorded.counts.items():
            left, right = (_strided(size, stride, dtype, self.device) for size, stride, dtype in (one, two))
            took = count * self._time(lambda left=left, right=right: left @ right)
            seconds += took
            layer_seconds += took * is_layer
            flops += count * 2.0 * left.numel() * right.shape[-1]
        return {"seconds": seconds, "layer_seconds": layer_seconds, "flops": flops}

    def _time(self, work: Callable[[], object]) -> float:
        work()
        if self.device.type == "cuda":  # several in a row: the host's own time is not a product's
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._wait()
            start.record()
            for _ in range(10):
                work()
            end.record()
            self._wait()
            return start.elapsed_time(end) / 1e4
        clock = time.process_time if self.spec.clock == "cpu" else time.perf_counter
        took = []
        for _ in range(3):
            start_s = clock()
            work()
            took.append(clock() - start_s)
        return sorted(took)[1]

    def kernels(self) -> dict[str, Any]:
        """Of a step: seconds in which the GPU computed or copied, and how often the host told it to."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            self.steps(2)
            self._wait()
        events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return {"kernel_s": sum(e.self_device_time_total for e in events) / 2e6, "launches": len(events) / 2}

    def profile(self) -> dict[str, Any]:
        kind = torch.profiler.ProfilerActivity
        activities = [kind.CPU, *([kind.CUDA] if self.device.type == "cuda" else [])]
        with torch.profiler.profile(activities=activities) as found:
            self.steps(2)
            self._wait()
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return {"lines": found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60).splitlines()}

    def compile_report(self) -> dict[str, Any]:
        """Graphs, breaks and recompiles since the process began."""
        counters = torch._dynamo.utils.counters
        return {
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": dict(counters["graph_break"]),
            "recompiles": len(counters["recompiles"]),
        }

    def syncs(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {"places": None}
        self.steps(2)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.steps(3)
        torch.cuda.set_sync_debug_mode("default")
        places = collections.Counter(f"{Path(item.filename).name}:{item.lineno}" for item in caught)
        return {"places": dict(places.most_common())}


class _Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside, by shape and layout: `counts[(is a layer's, left, right)]`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[tuple[bool, Any, Any]] = collections.Counter()

    def add(self, is_layer: bool, left: Tensor, right: Tensor) -> None:
        one, two = ((tuple(item.shape), tuple(item.stride()), item.dtype) for item in (left, right))
        self.counts[is_layer, one, two] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            self.add(name == "aten::mm", args[0], args[1])
        elif name in ("aten::addmm", "aten::baddbmm"):
            self.add(name == "aten::addmm", args[1], args[2])
        elif name in ("aten::convolution", "aten::convolution_backward"):
            pixels, weight = args[-11:][1:3] if name.endswith("backward") else args[:2]
            dim, values = weight.shape[0], weight[0].numel()
            rows = torch.empty(pixels.numel() // values, values, dtype=pixels.dtype, device="meta")
            out = torch.empty(len(rows), dim, dtype=pixels.dtype, device="meta")
            self.add(
                True, *((rows.t(), out) if name.endswith("backward") else (rows, out[:values].t().contiguous().t()))
            )
        elif "scaled_dot_product" in name:
            query, key, value = (item.flatten(0, 1) for item in (args[1:4] if "backward" in name else args[:3]))
            scores = torch.empty(len(query), query.shape[1], key.shape[1], dtype=query.dtype, device="meta")
            pairs = [(query, key.transpose(1, 2)), (scores, value)]
            if "backward" in name:
                pairs = [(scores, key), (scores.transpose(1, 2), query), (scores.transpose(1, 2), query), pairs[0]]
            for left, right in pairs:
                self.add(False, left, right)
        return func(*args, **(kwargs or {}))


def _strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this layout."""
    length = 1 + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    return torch.ones(length, dtype=dtype, device=device).as_strided(size, stride)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux
        return 0
    return pages * resource.getpagesize()


def main() -> None:
    """Answer commands until stdin ends."""
    arm = Arm(Spec(**json.loads(sys.argv[1])))
    print(json.dumps({"parameters": sum(weight.numel() for weight in arm.model.parameters())}), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        print(json.dumps(getattr(arm, command)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()
