"""Semantic segmentation: a class for every pixel, by a UPerNet on any encoder of several stages."""
