"""The parts of a sweep: its trials, what came of them, what it says meanwhile."""

import contextlib

from mixmae.machine import settle_environment

with contextlib.suppress(ValueError):  # which the command says
    settle_environment()  # Ray Tune asks for the home folder as soon as it is imported
