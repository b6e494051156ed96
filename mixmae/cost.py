"""What a training step costs in memory and time, read off its operations: nothing is computed, no card is needed.

The step runs on fake tensors, which have shapes and no values. Its memory is counted storage by storage, as torch's
allocator would hold them at the worst moment. Its time on a card is a roofline: each operation takes as long as the
slower of its arithmetic and its reads and writes, at the rates of the card's data sheet. No run is faster; how much
slower one is, only a run on such a card can tell.
"""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mixmae.layers import attention

Precision = Literal["float32", "bfloat16"]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU as its data sheet describes it; rates without sparsity, float32 as TF32."""

    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float
    bandwidth_gb_s: float


CARDS = {
    "H200": Card(memory_gib=139, bfloat16_tflops=989, float32_tflops=494, bandwidth_gb_s=4800),
    "H100": Card(memory_gib=79, bfloat16_tflops=989, float32_tflops=494, bandwidth_gb_s=3350),
    "A100": Card(memory_gib=79, bfloat16_tflops=312, float32_tflops=156, bandwidth_gb_s=2039),
    "A100-40GB": Card(memory_gib=39, bfloat16_tflops=312, float32_tflops=156, bandwidth_gb_s=1555),
    "L40S": Card(memory_gib=44, bfloat16_tflops=362, float32_tflops=183, bandwidth_gb_s=864),
    "L4": Card(memory_gib=22, bfloat16_tflops=121, float32_tflops=60, bandwidth_gb_s=300),
    "RTX4090": Card(memory_gib=23, bfloat16_tflops=165, float32_tflops=82, bandwidth_gb_s=1008),
}
"""By name: NVIDIA's data sheets (H100, H200 and A100 as SXM). memory_gib is what programs see."""
USABLE_MEMORY = 0.9
"""Share of a card's memory that a step may take: CUDA's context, libraries and fragmentation take the rest."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One micro-batch forward and backward, and the optimiser's step. Bytes unless said otherwise."""

    images: int
    """Of the micro-batch."""
    weights: int
    """Parameters and buffers."""
    gradients: int
    optimizer: int
    activations: dict[str, int]
    """What each part of the model keeps from forward to backward."""
    peak: int
    """All that is alive at the worst moment: the above and what is there for a moment."""
    flops: int
    """Of matrix products and convolutions, forward and backward: two per multiply-accumulate."""
    seconds: float | None = None
    """At least, by the card's roofline; None without a card."""
    product_seconds: float | None = None
    """Of it, the part of matrix products, convolutions and attention."""

    @property
    def state(self) -> int:
        """What is there whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    def sharded(self, num_workers: int, gathered: int) -> StepCost:
        """The memory of each worker where they share out weights, gradients and the optimiser's state.

        Args: gathered: bytes of weights that are whole at once.
        Returns: with a peak that is rather too high: the gradients of that moment are counted whole.
        """
        spared = 1 - 1 / num_workers
        return replace(
            self,
            weights=self.weights // num_workers,
            gradients=self.gradients // num_workers,
            optimizer=self.optimizer // num_workers,
            peak=self.peak - int(spared * (self.weights + self.optimizer - gathered)),
        )


def measure_step(
    build: Callable[[], nn.Module],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    image_shape: tuple[int, int, int],
    images: int,
    precision: Precision = "float32",
    card: Card | None = None,
    floats_have_values: bool = False,
) -> StepCost:
    """Count what a step costs.

    Args:
        build: makes the model; optimizer_of: its optimiser.
        loss_of: (model, images (B, C, H, W) float32) -> the loss. Draws of its own go through `model.draw`, if it has
            that: they are real.
        image_shape: (C, H, W).  images: B, of a micro-batch.
        precision: of the forward pass, as in the training loop.
        card: where it is to run; None: this machine's CPU. It decides which kernel attention takes.
        floats_have_values: compute what follows from real tensors and generators alone for floats, too, because sizes
            follow from boxes. False: for integers alone, since masks as floats take much memory.
    Returns: the cost of the second step, when the optimiser has its state.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True), _attention_of(card), _Meter(card, floats_have_values) as meter:
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        optimizer = optimizer_of(model)
        if draw := getattr(model, "draw", None):
            setattr(model, "draw", _with_values(draw))  # noqa: B010 - mypy knows no such attribute
        batch = torch.empty(images, *image_shape)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
        for _ in range(2):
            meter.restart()
            with meter.saving_of(model), autocast:
                loss = loss_of(model, batch)
            loss.backward()
            gradients = sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss
        states = (value for state in optimizer.state.values() for value in state.values())
        return StepCost(
            images=images,
            weights=sum(map(_bytes, (*model.parameters(), *model.buffers()))),
            gradients=gradients,
            optimizer=sum(_bytes(value) for value in states if isinstance(value, Tensor)),
            activations=meter.saved,
            peak=meter.peak,
            flops=meter.flops,
            seconds=None if card is None else meter.seconds,
            product_seconds=None if card is None else meter.product_seconds,
        )


def largest_micro_batch(cost_of: Callable[[int], StepCost], *, unit: int, limit: int, memory: float) -> int:
    """The largest number of images whose step fits.

    Args: cost_of: measures a micro-batch.  unit: it must be a multiple of it.  limit: and no larger than it.
        memory: in bytes.
    Returns: 0 if not even `unit` fits.   Memory grows by the same for each image, so two measurements tell.
    """
    small, large = cost_of(unit), cost_of(2 * unit)
    each = max(1, large.peak - small.peak)
    more = int((memory - small.peak) // each)
    return max(0, min(limit // unit, 1 + more)) * unit


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _with_values(draw: Callable[..., Any]) -> Callable[..., Any]:
    """A method's draws, which have values: sizes follow from them."""

    def drawn(images: Tensor, *arguments: Any, **named: Any) -> Any:
        with unset_fake_temporarily():
            return draw(torch.empty(images.shape), *arguments, **named)

    return drawn


@contextlib.contextmanager
def _attention_of(card: Card | None) -> Iterator[None]:
    """Attention as a card would do it, by a kernel that keeps no scores; without a card as a CPU does it."""
    if card is None:
        yield
        return

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **named: Any) -> Tensor:
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, compute_log_sumexp=True)[0]

    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused),
        mock.patch.object(attention, "on_cpu", return_value=False),
    ):
        yield


class _Meter(TorchDispatchMode):
    """Sees each operation: its FLOPs, its reads and writes, and the memory that it makes."""

    def __init__(self, card: Card | None, floats_have_values: bool) -> None:
        super().__init__()
        self._card, self._floats_have_values = card, floats_have_values
        self._alive = 0
        self._storages: dict[weakref.ref[torch.UntypedStorage], int] = {}
        self._parts: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Count from here on; what is alive stays so."""
        self.flops, self.peak = 0, self._alive
        self.seconds = self.product_seconds = 0.0
        self.saved: dict[str, int] = {}

    @contextlib.contextmanager
    def saving_of(self, model: nn.Module) -> Iterator[None]:
        """Note what the model's forward keeps for backward, by the part that keeps it."""
        before = {id(ref()) for ref in self._storages}
        kept: list[torch.UntypedStorage] = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in before:
                before.add(id(storage))
                kept.append(storage)  # or another one could get its id
                part = self._parts[-1] if self._parts else "loss"
                self.saved[part] = self.saved.get(part, 0) + storage.nbytes()
            return tensor

        hooks = []
        for part, module in _parts(model):
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: self._parts.append(part)))
            hooks.append(module.register_forward_hook(lambda *_: self._parts.pop() and None))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # What follows from the draws alone has values, too: it is made of integers that have them, or of nothing.
        floats = self._floats_have_values
        has_values = bool(read) and not any(
            isinstance(leaf, FakeTensor) or (leaf.is_floating_point() and not floats) for leaf in read
        )
        if not has_values:
            out = func(*args, **kwargs)
        if not read:
            is_drawn = floats and kwargs.get("generator") is not None
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            has_values = is_drawn or not any(tensor.is_floating_point() for tensor in made)
        if has_values:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in written:
            self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self._alive)
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        self.flops += flops
        if self._card is not None and written and not func.is_view:
            moved = sum(min(_bytes(tensor), tensor.untyped_storage().nbytes()) for tensor in (*read, *written))
            card, in_half = self._card, any(tensor.dtype == torch.bfloat16 for tensor in read)
            rate = 1e12 * (card.bfloat16_tflops if in_half else card.float32_tflops)
            seconds = max(flops / rate, moved / (1e9 * card.bandwidth_gb_s))
            self.seconds += seconds
            self.product_seconds += seconds if flops else 0
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as long as it lives."""
        ref = weakref.ref(storage, self._gone)
        if ref not in self._storages:
            self._storages[ref] = storage.nbytes()
            self._alive += storage.nbytes()

    def _gone(self, ref: weakref.ref[torch.UntypedStorage]) -> None:
        self._alive -= self._storages.pop(ref)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts by which activations are told apart: the stages or blocks of the encoder, the decoder, the heads."""
    for name, module in model.named_modules():
        if re.fullmatch(r"encoder\.(stages\.\d+|(?!stages|blocks)\w+)|roi_heads\.\w+|(?!encoder)\w+", name):
            yield name, module
        elif re.fullmatch(r"encoder\.blocks\.\d+", name):
            yield "encoder.blocks", module
