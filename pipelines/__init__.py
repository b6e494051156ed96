"""The verbs a user runs: make_shards, pretrain, finetune and their kin."""
