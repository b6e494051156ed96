"""What of the Ray shell can be tested without Ray."""

import pytest

from mixmae.training.failures import TrainingStopped
from mixmae.training.worker import refuse_out_of_memory


def test_a_batch_that_does_not_fit_is_not_tried_again():
    with pytest.raises(TrainingStopped, match=r"rank 2: .* lower --loop.micro-batch-size"):
        refuse_out_of_memory("rank 2: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    refuse_out_of_memory("rank 2: RuntimeError: NCCL error")
