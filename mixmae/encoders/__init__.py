"""Encoders: one architecture a file, the same class for pretraining and finetuning. base.py says what each promises."""
