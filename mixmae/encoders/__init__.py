"""Encoders: one architecture per file, the same class for pretraining and finetuning. base.py has the protocol."""
