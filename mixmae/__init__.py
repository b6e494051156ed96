"""MixMAE: self-supervised pretraining of hierarchical vision encoders on mixed images (CVPR 2023)."""

__version__ = "0.1.0"
