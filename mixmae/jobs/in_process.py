"""Train a job in this process: plain torch, without Ray, MLflow or checkpoints. For comparisons of many short runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mixmae.data.blocks import ImageBatch, local_batches
from mixmae.data.order import Plan
from mixmae.jobs.job import Job
from mixmae.share import WorkerShare
from mixmae.training.loop import Batch, Events, Silent, TrainState, step_seed, train
from mixmae.training.optim import build_optimizer
from mixmae.training.recompute import recompute_stages


def build_seeded(job: Job) -> nn.Module:
    """The job's untrained model, with the initial weights that its seed gives in any run."""
    torch.manual_seed(step_seed(job.loop.seed, "init"))
    return job.build_model()


def batches_of(job: Job, num_steps: int, share: WorkerShare | None = None) -> Iterator[ImageBatch]:
    """The batches of the job's first steps, made in this process.   Args: share: of one of several workers."""
    config = job.config
    return local_batches(
        job.source,
        Plan(chunk_sizes=job.source.chunk_sizes, seed=job.loop.seed, window_rows=job.data.window_rows),
        config.augment,
        share=share or job.share(rank=0, num_workers=1),
        stop_step=num_steps,
        channels=config.encoder.in_channels,
    )


def train_in_process(
    job: Job, model: nn.Module, *, events: Events | None = None, batches: Iterator[Batch] | None = None
) -> TrainState:
    """Train a model to the job's end, on the CPU.

    Args:    events: told of progress.  batches: in place of the job's own.
    Returns: the final state.

    Images, crops and mixes are those of a run on Ray of the same seed. There is no average of weights, and nothing is
    logged, evaluated or saved.
    """
    state = TrainState()
    recompute_stages(model, job.loop.recompute_stages)
    train(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        peak_lr=job.optim.peak_lr(job.loop.batch_size),
        clip_grad_norm=job.optim.clip_grad_norm,
        step_function=job.step,
        batches=batches or batches_of(job, job.length.total_steps),
        share=job.share(rank=0, num_workers=1),
        state=state,
        config=job.loop,
        length=job.length,
        events=events or Silent(),
        device=torch.device("cpu"),
    )
    return state
