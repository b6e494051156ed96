"""Pascal VOC's lists of its splits: ImageSets/Main/train.txt and the like, with the name of an image on each line."""

from __future__ import annotations

from collections.abc import Collection

from mixmae.data.account import Tally
from mixmae.data.sources.storage import Storage

_LISTS = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
_BOTH = "trainval.txt"


def read_image_sets(
    storage: Storage, folder: str, usable: Collection[str], there: Collection[str], tally: Tally
) -> dict[str, list[str]]:
    """The images of each split, by name without suffix; empty if there are no lists, or none of a usable image.

    Where train.txt is missing, training has those of trainval.txt, or else all usable images, that no other list names.

    Args: folder: that of the lists.  usable: names.  there: those of all images, also of unusable ones, which are
        counted elsewhere.
    """
    splits: dict[str, list[str]] = {}
    for split, base in _LISTS.items():
        names = _read(storage, f"{folder}/{base}", usable, there, tally)
        if names:
            splits[split] = names
    if "train" not in splits:
        both = _read(storage, f"{folder}/{_BOTH}", usable, there, tally)
        others = {name for names in splits.values() for name in names}
        rest = [name for name in both or (sorted(usable) if splits else ()) if name not in others]
        splits = {"train": rest, **splits} if rest else splits
    trained = set(splits.get("train", ()))
    for split in splits.keys() - {"train"}:
        for name in splits[split]:
            if name in trained:
                what = "images are in the lists of two splits, so that what is learnt from is judged, too"
                tally.add(what, name, "list each in one")
    return splits


def _read(storage: Storage, path: str, usable: Collection[str], there: Collection[str], tally: Tally) -> list[str]:
    """The usable names of a list, each once; names may have spaces, and a number may follow."""
    try:
        text = storage.read_file(path).decode("utf-8-sig", "surrogateescape")
    except OSError:
        return []
    found: dict[str, None] = {}
    for line in text.splitlines():
        whole = line.strip()
        name = whole if whole in there or not whole else whole.split()[0]
        if name in usable:
            found[name] = None
        elif name and name not in there:
            tally.add("images that the lists of ImageSets name are not there", whole)
    if text.split() and not found:
        tally.add("lists of ImageSets name no image that is annotated", path.rpartition("/")[2])
    return list(found)
