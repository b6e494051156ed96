"""Sharding: each worker keeps a part of the weights, of their gradients and of the optimiser's state (torch's FSDP2).

The weights of a block are gathered where its forward and its backward pass begin, and dropped where they end. All
workers gather together, so one that ran the model alone would wait for ever: evaluations and pictures get a whole copy.
Checkpoints hold whole tensors, and any number of workers continues them, sharded or not.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BLOCK = re.compile(r"encoder\.(.*\.)?blocks\.\d+")

Gather = Callable[[], AbstractContextManager[nn.Module]]
"""Opens a context with the whole model: plain, with the weights and buffers of that moment. All workers open it at the
same steps."""


def shard(model: nn.Module, device: torch.device) -> Gather:
    """Leave each worker of the initialised group its part of every parameter, a piece of the first dimension.

    Call it first: the optimiser and the average are of the parts, and the copy has neither compiled nor recomputed
    blocks. Names stay as they are, and so does what is computed, up to the order of float additions. Weights are
    gathered in float32 and autocast rounds them, as without sharding. Gradients are shared out with each micro-batch:
    kept whole until the last one, they would take the memory that sharding saves.

    Args: model: bare, on the device, with the same weights on all workers.
    Returns: what gives a copy of the whole model; changes of the copy are lost.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    # A copy without memory: deepcopy takes what it is given for each tensor.
    shapes: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    shapes |= {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in model.parameters()}
    whole_model = copy.deepcopy(model, shapes)
    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    # FSDP gathers where a module is called, and blocks of encoders never run otherwise. Those of decoders also run in
    # halves, so they belong to the root, which is gathered for the whole step.
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def gather() -> Iterator[nn.Module]:
        whole_model.to_empty(device=device).train(model.training)
        values = dict(chain(model.named_parameters(), model.named_buffers()))
        for name, tensor in chain(whole_model.named_parameters(), whole_model.named_buffers()):
            tensor.data.copy_(whole(values[name].detach()))
        try:
            yield whole_model
        finally:
            whole_model.to("meta")

    return gather


def most_gathered(model: nn.Module) -> int:
    """Bytes of weights that a step on a sharded model has whole at once: two blocks, as the next one is fetched ahead,
    and the root's.   Args: model: before it is sharded."""
    blocks = sorted(map(_weight_bytes, _blocks(model)))
    return _weight_bytes(model) - sum(blocks[:-2])


def unsharded(model: nn.Module) -> Gather:
    """The same for a model that is whole everywhere: the model itself."""
    return lambda: contextlib.nullcontext(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on the model."""
    return any(map(_is_part, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """A whole tensor from the workers' parts, which all call this in the same order; other tensors as they are."""
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This worker's part of a whole tensor, as that of `like` was cut; whole where `like` is. Nothing is sent.

    Args: value: on any device.  like: of the same shape.
    """
    if not _is_part(like) or _is_part(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # A copy, as a view would keep the whole in memory.
    return distribute_tensor(value.detach(), mesh, placements, src_data_rank=None).clone()


def cut_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Leave this worker's parts in the state_dict of a whole optimiser, before `optimizer` loads it."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for index, parameter in enumerate(parameters):
        own = state["state"].get(index, {})
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:  # not so the number of steps
                own[name] = part_of(value, parameter)


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if _BLOCK.fullmatch(name)]


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor: importing its class takes half a second where nothing is sharded
