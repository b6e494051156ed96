"""The training runtime: optimiser, schedule, checkpoints, the plain-torch loop and its Ray Train shell."""
