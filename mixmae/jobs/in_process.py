"""Train a job in this process: plain torch, without Ray, MLflow or checkpoints. For comparisons of many short runs."""

from __future__ import annotations

import torch
from torch import nn

from mixmae.data.blocks import local_batches
from mixmae.data.order import Plan
from mixmae.jobs.job import Job
from mixmae.training.loop import Silent, TrainState, step_seed, train
from mixmae.training.optim import build_optimizer


def build_seeded(job: Job) -> nn.Module:
    """The job's untrained model, with the initial weights that its seed gives in any run."""
    torch.manual_seed(step_seed(job.loop.seed, "init"))
    return job.build_model()


def train_in_process(job: Job, model: nn.Module) -> TrainState:
    """Train a model to the job's end, on the CPU.   Returns: the final state.

    Images, crops and mixes are those of a run on Ray of the same seed. There is no average of weights, and nothing is
    logged, evaluated or saved.
    """
    config, state = job.config, TrainState()
    plan = Plan(chunk_sizes=job.source.chunk_sizes, seed=job.loop.seed, window_rows=job.data.window_rows)
    batches = local_batches(
        job.source,
        plan,
        config.augment,
        share=config.share(num_workers=1),
        stop_step=job.length.total_steps,
        channels=config.encoder.in_channels,
    )
    train(
        model=model,
        optimizer=build_optimizer(model, job.optim),
        peak_lr=job.optim.peak_lr(job.loop.batch_size),
        clip_grad_norm=job.optim.clip_grad_norm,
        step_function=job.step,
        batches=batches,
        state=state,
        config=job.loop,
        length=job.length,
        events=Silent(),
        device=torch.device("cpu"),
    )
    return state
