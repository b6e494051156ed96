"""The classes of a training and a validation set, checked before a classifier is trained on them."""

from __future__ import annotations

import numpy as np

from mixmae.data.source import DataError, Source


def read_classes(source: Source, validation: Source) -> list[str]:
    """The names of the classes, after checking all labels; prints a note on classes without images and the like.

    Returns: the name of each class by its index; without names, the index itself.
    Raises: DataError if the labels cannot be trained on, or the validation set has none of the classes.
    """
    remedy = "give images in a folder for each class, shards with an integer column `label`, or tars with .cls files"
    if not source.has_labels:
        raise DataError(f"{source.name} has no labels, and a classifier needs them: {remedy} (docs/data.md)")
    labels, judged = source.read_labels(), validation.read_labels()
    known = labels[labels >= 0]
    if not len(known):
        raise DataError(f"no image of {source.name} has a class (all labels are -1): {remedy} (docs/data.md)")
    names = [str(name) for name in source.class_names or range(int(known.max()) + 1)]
    for part, values in ((source, known), (validation, judged)):
        if values.max() >= len(names):
            raise DataError(
                f"{part.name} has the label {values.max()}, but there are {len(names)} classes (0 to {len(names) - 1}"
                f"{'' if source.class_names else ', the largest label of the training images'}): correct the labels, "
                "or the names of the classes."
            )
    if not (judged >= 0).any():
        raise DataError(
            f"the validation set {validation.name} has no image with a class: label it, or leave it out, so that a "
            "tenth of the training images is held out."
        )
    shown = np.unique(known)
    if source.class_names is None and 2 * len(shown) <= len(names):
        raise DataError(
            f"the labels of {source.name} go up to {known.max()}, but only {len(shown)} of these numbers are used: "
            "number the classes from 0 without gaps."
        )
    if len(shown) < 2:
        raise DataError(f"all images of {source.name} are of one class: there is nothing to tell apart.")
    strangers = np.setdiff1d(judged[judged >= 0], shown)
    for count, what in (
        (len(labels) - len(known), "training images have no class and are left out"),
        (len(names) - len(shown), f"of {len(names)} classes have no training image"),
        (len(strangers), "classes of the validation set have no training image"),
        (len(shown) - len(np.unique(judged[judged >= 0])), "classes of the training set have no validation image"),
    ):
        if count > 0:
            print(f"note: {count} {what}")
    return names
