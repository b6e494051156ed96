"""Mean and std of ImageNet's pixels, with which images are normalised unless a run names others."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Per channel (RGB), of values in [0, 1]."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel (RGB), of values in [0, 1]."""
