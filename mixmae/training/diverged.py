"""What is kept of a step whose gradient was not finite, so that it can be run again and looked at.

batch.pt            this worker's last micro-batch: images, rows, labels, epochs
job.pickle          the job; like every pickle, to be opened only by whom it belongs to
model.safetensors   the weights before the step, which are those before the first bad one
state.json          config, and which step and seed it was
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mixmae.training.checkpoint import MODEL_FILE, CheckpointError, load_checkpoint, read_state, verify, write_parts
from mixmae.training.loop import Diverged, step_seed
from mixmae.training.sharding import whole

BATCH_FILE, JOB_FILE = "batch.pt", "job.pickle"


def write_diverged(folder: Path, *, job: Any, model: nn.Module, bad: Diverged) -> None:
    """Write one worker's part of the last bad step; all workers call it.   Args: job: the TrainingJob.  model: bare."""
    assert is_dataclass(bad.batch)
    tensors = {field.name: getattr(bad.batch, field.name) for field in fields(bad.batch)}
    kept = {name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)}
    position = {"step": bad.step - 1, "first_sample": bad.first_sample, "seed": job.loop.seed}
    weights = {name: whole(value.detach()).cpu() for name, value in model.state_dict().items()}
    write_parts(folder, {MODEL_FILE: weights, BATCH_FILE: kept}, job.describe() | {"position": position})
    (folder / JOB_FILE).write_bytes(pickle.dumps(job))


def replay(folder: Path) -> tuple[float, list[str]]:
    """Run the forward and the backward pass of a kept step once more, on the CPU, and look where it breaks.

    Returns: the loss, and what is not finite, in the order in which it is computed: weights, modules' outputs, the
        loss, and what torch's detection of anomalies says of the backward pass.
    Raises: CheckpointError if this is no such folder.
    """
    if not (folder / JOB_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds no step that was kept: give OUTPUT/diverged/rank0 of a run that stopped."
        )
    verify(folder)
    position = read_state(folder)["position"]
    job = pickle.loads((folder / JOB_FILE).read_bytes())
    model = job.build_model()
    load_checkpoint(folder, model=model)
    batch = SimpleNamespace(**torch.load(folder / BATCH_FILE, weights_only=True), broken=())
    found = [f"weights: {name}" for name, value in model.state_dict().items() if not _is_finite(value)]

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not _is_finite(output):
                found.append(f"output of {name} ({type(module).__name__})")

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name or "the model"))
    seed, step, first = position["seed"], position["step"], position["first_sample"]
    generator = torch.Generator().manual_seed(step_seed(seed, "step", step))
    torch.manual_seed(step_seed(seed, "modules", step, first))
    model.train()
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole trace of the forward pass: its error has the function's name
        loss = job.step(model, batch, generator, first).loss
        if not _is_finite(loss):
            found.append("the loss")
        try:
            loss.backward()
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    found += [
        f"gradient of {name}"
        for name, value in model.named_parameters()
        if value.grad is not None and not _is_finite(value.grad)
    ]
    return loss.item(), found


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return True
