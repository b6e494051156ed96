"""Finetuning a pretrained encoder: the classifier and its loss."""
