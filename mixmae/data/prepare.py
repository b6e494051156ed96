"""From what a user names as data to the sources of a run: what training reads slowly becomes shards first."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mixmae.data.account import escaped
from mixmae.data.shards.pack import is_image_folder, make_shards
from mixmae.data.shards.plan import DEFAULT_SET, built_in
from mixmae.data.source import Source
from mixmae.data.sources import open_train_and_held_out


def open_for_training(data: str | None, folder: Path, holdout_rows: int) -> tuple[Source, Source]:
    """The training and the held-out source; image folders and built-in sets become shards in `folder` first.

    Args:
        data: what open_source takes, or the name of a built-in set (default: moths).
        holdout_rows: of a set without a validation split, at most this many images are held out.
    Raises: DataError.
    """
    data = data or DEFAULT_SET
    if built_in(data):
        location = str(make_shards(data, folder / data.replace(":", "-")).folder)
    elif is_image_folder(data):
        path = Path(data).expanduser().resolve()
        # What has changed since the last run is packed anew.
        location = str(make_shards(path, folder / _folder_name(path), overwrite=True).folder)
    else:
        location = data
    return open_train_and_held_out(location, holdout_rows)


def _folder_name(path: Path) -> str:
    """The name of a folder's shards, another one for each path. It must not change: later runs look for it."""
    digest = hashlib.blake2b(f"0/{path}".encode(errors="surrogateescape"), digest_size=8).digest()
    return f"{escaped(path.name)}-{(int.from_bytes(digest, 'big') >> 1) % 16**6:06x}"
