"""Weights that several tests of conversion read."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


@pytest.fixture
def vit_state() -> dict[str, Tensor]:
    """Weights of a small ViT of timm, with a class token and a head."""
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=7).state_dict()
