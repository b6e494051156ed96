"""Blocks that two or more encoders or decoders share. They import torch and nothing of this package but mixing."""
