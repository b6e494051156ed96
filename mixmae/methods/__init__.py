"""Pretraining objectives: one a file, each given a built encoder."""
