"""pretrain.py with steps that take their time, and a driver that looks for more room every second."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mixmae.jobs.pretraining import PretrainJob
from mixmae.step import StepOutput

PAUSE_S = 0.7
HURRY = "hurry"
"""A file in the run's folder; once it is there, steps take no longer than they must."""


class PacedJob(PretrainJob):
    def step(self, model: Any, batch: Any, generator: Any, first_sample: int) -> StepOutput:
        if not Path(self.folder, HURRY).exists():
            time.sleep(PAUSE_S)
        return super().step(model, batch, generator, first_sample)


def main() -> int:
    from mixmae.training import elastic
    from pipelines import pretrain
    from tests.ray import paced  # the workers import it by this name

    elastic.LOOK_S, elastic.STEADY_S, elastic.FIRST_PAUSE_S = 1.0, 3.0, 5.0
    pretrain.PretrainJob = paced.PacedJob  # type: ignore[misc]
    return pretrain.main()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
