"""One of two workers that train a small detector and evaluate it, for test_detection.py.

Arguments: rank, data, changes of the config as JSON, output, store.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[3]))

from mixmae.data.blocks import local_batches
from mixmae.data.order import Plan
from mixmae.data.sources import open_source
from mixmae.jobs.in_process import build_seeded
from mixmae.training.loop import Silent, TrainState, train
from mixmae.training.optim import build_optimizer
from tests.unit.jobs.test_detection import job_on

rank, data, changes, output, store = int(sys.argv[1]), *sys.argv[2:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
values = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(changes).items()}
job = job_on(open_source(data), Path(output) / str(rank), **values)
model = build_seeded(job)
train(
    model=DistributedDataParallel(model),
    optimizer=build_optimizer(model, job.optim),
    peak_lr=job.optim.peak_lr(job.loop.batch_size),
    clip_grad_norm=None,
    step_function=job.step,
    batches=local_batches(
        job.source,
        Plan(chunk_sizes=job.source.chunk_sizes, seed=job.loop.seed, window_rows=job.data.window_rows),
        job.config.augment,
        share=job.config.share(num_workers=2, rank=rank),
        stop_step=job.length.total_steps,
    ),
    share=job.config.share(num_workers=2, rank=rank),
    state=TrainState(),
    config=job.loop,
    length=job.length,
    events=Silent(),
    device=torch.device("cpu"),
)
torch.save(model.state_dict(), Path(output) / f"{rank}.pt")
figures = job.evaluate(model.eval(), rank=rank, num_workers=2)
(Path(output) / f"{rank}.json").write_text(json.dumps(figures))
# Who leaves while the other still waits for it makes it fail.
dist.barrier()
dist.destroy_process_group()
