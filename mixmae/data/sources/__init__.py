"""Every accepted layout of a collection of images, each read as a Source."""

from mixmae.data.sources.open import layout_of, list_splits, open_source, open_train_and_held_out
from mixmae.data.sources.splits import SPLITS, split_holdout

__all__ = ["SPLITS", "layout_of", "list_splits", "open_source", "open_train_and_held_out", "split_holdout"]
