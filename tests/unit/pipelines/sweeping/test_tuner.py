"""What a sweep of an earlier version needs to be continued."""

from __future__ import annotations

import pickle

from pipelines.sweeping.progress import Progress
from pipelines.sweeping.tuner import know_former_modules


def test_pickles_of_earlier_versions_are_understood():
    """Tune keeps the callback that reports progress by the name of its module."""
    know_former_modules()
    assert pickle.loads(b"cpipelines.sweep_progress\nProgress\n.") is Progress
