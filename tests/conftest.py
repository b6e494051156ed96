"""Settings for all tests."""

import torch

# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other cost up to 50 times as
# much.
torch.set_num_threads(1)
