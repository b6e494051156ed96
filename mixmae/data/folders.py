"""What lies in a folder of image files: which files, in which split, of which class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mixmae.data.sources import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
)

_SPLIT_FOLDERS = {"train": ("train", "training"), "validation": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class ImageFile:
    """One image file of a folder."""

    path: Path
    """Absolute."""
    relative: str
    """Path below the folder that was listed, with forward slashes."""
    label: int
    """Class index, -1 without classes."""
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Listing:
    """The image files of a folder, by split and in the order of their names."""

    splits: dict[str, list[ImageFile]]
    class_names: tuple[str, ...] | None
    """Sorted names of the class folders, or None where folders mean nothing."""
    unreadable: tuple[str, ...]
    """Files with an image's suffix that are empty or may not be read, each with the reason."""

    @property
    def num_files(self) -> int:
        return sum(len(files) for files in self.splits.values())


def list_images(folder: str | Path) -> Listing:
    """List the image files below a folder, through links; hidden files and folders are left out.

    Splits: a `train` folder makes its neighbours `val` and `test` splits; otherwise all is "train".
    Classes: if every image lies exactly one folder deep (root/CLASS/x.jpg, root/train/CLASS/x.jpg) and there are at
    least two such folders, these are the classes, in the order of their names as torchvision's ImageFolder numbers
    them; otherwise the images have no class.

    Raises: DataError if the folder is missing or holds no image.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        what = "does not exist" if not root.exists() else "is not a folder"
        raise DataError(f"the image folder {root} {what}: check the spelling")
    found, unreadable = _walk(root)
    if not found:
        problem = f"; {len(unreadable)} are empty or unreadable, such as {unreadable[0]}" if unreadable else ""
        raise DataError(f"no image in {root}{problem}: it needs files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")

    by_split: dict[str, list[tuple[str, os.stat_result]]] = {"train": found}
    prefixes = {"train": ""}
    folders = {relative.split("/", 1)[0] for relative, _ in found if "/" in relative}
    named = {split: next((n for n in names if n in folders), None) for split, names in _SPLIT_FOLDERS.items()}
    if named["train"] is not None:
        prefixes = {split: f"{name}/" for split, name in named.items() if name is not None}
        by_split = {
            split: [(relative, stat) for relative, stat in found if relative.startswith(prefix)]
            for split, prefix in prefixes.items()
        }

    class_names = _class_folders(
        [relative.removeprefix(prefixes[split]) for split, files in by_split.items() for relative, _ in files]
    )
    index = {name: number for number, name in enumerate(class_names or ())}
    splits = {
        split: [
            ImageFile(
                path=root / relative,
                relative=relative,
                label=index[relative.removeprefix(prefixes[split]).split("/", 1)[0]] if index else -1,
                num_bytes=stat.st_size,
                modified_ns=stat.st_mtime_ns,
            )
            for relative, stat in files
        ]
        for split, files in by_split.items()
    }
    return Listing(splits=splits, class_names=class_names, unreadable=tuple(unreadable))


def _walk(root: Path) -> tuple[list[tuple[str, os.stat_result]], list[str]]:
    found: list[tuple[str, os.stat_result]] = []
    unreadable: list[str] = []
    seen = {os.path.realpath(root)}
    for parent, folders, files in os.walk(root, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith((".", "__MACOSX")) and real not in seen:  # a link may lead back up
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                continue
            path = os.path.join(parent, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            try:
                stat = os.stat(path)
            except OSError as error:
                unreadable.append(f"{relative} ({error.strerror})")
                continue
            if stat.st_size == 0:
                unreadable.append(f"{relative} (empty)")
            elif not os.access(path, os.R_OK):
                unreadable.append(f"{relative} (no permission)")
            else:
                found.append((relative, stat))
    return sorted(found, key=lambda item: item[0]), sorted(unreadable)


def _class_folders(relatives: list[str]) -> tuple[str, ...] | None:
    parts = [relative.split("/") for relative in relatives]
    names = sorted({part[0] for part in parts})
    return tuple(names) if all(len(part) == 2 for part in parts) and len(names) > 1 else None
