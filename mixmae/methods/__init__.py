"""Pretraining objectives: one per file, each given a built encoder."""
