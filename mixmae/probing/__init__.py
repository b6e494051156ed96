"""Judging an encoder without finetuning it: its features, kNN, ridge and linear layers on them."""
