"""Judging an encoder without finetuning it: its features; kNN, ridge regression and linear layers on them."""
