"""Stores behind URIs (s3://, gs://, ...), which pyarrow's filesystems open: how they are named and connected to."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_GOOGLE_RETRY_S = 20
"""Google's client would try for 15 minutes to reach a store that is not there; S3's gives up after some seconds."""


def is_uri(text: str) -> bool:
    """Whether this is a URI, and not a local path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def store_uri(place: str | Path) -> str | None:
    """The URI of a store that a command line names; None for a local path.

    A Path has lost the second slash of s3://BUCKET/PREFIX.   Raises: ValueError for file://.
    """
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.+)", str(place))
    if found is None or Path(place).exists():
        return None
    if found[1] == "file":
        raise ValueError(f"{place} is a folder of this machine: give its path, without file://.")
    return f"{found[1]}://{found[2]}"


def refuse_store(place: str | Path | None, what: str) -> None:
    """Raise ValueError where something that needs a local folder, `what`, is given a store."""
    if place is not None and (uri := store_uri(place)):
        raise ValueError(
            f"--output is {without_secrets(uri)}: {what} is written to a local or a shared folder, give one."
        )


def without_secrets(uri: str) -> str:
    """A URI without its user, password and query: what may be printed and logged."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@lru_cache(maxsize=64)
def connect(uri: str) -> tuple[Any, str]:
    """pyarrow's filesystem of a URI such as s3://bucket/prefix?endpoint_override=HOST&scheme=http, and the path in it.

    Connections are kept per process.   Raises: ValueError if the URI is none that pyarrow knows.
    """
    import pyarrow as pa  # not every command that may be given a store needs what this takes to load
    import pyarrow.fs as pa_fs

    bounded = uri
    if uri.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        bounded += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GOOGLE_RETRY_S}"
    try:
        filesystem, path = pa_fs.FileSystem.from_uri(bounded)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{without_secrets(uri)} cannot be opened ({reason}): give a local path or a URI that pyarrow knows, "
            "such as s3://bucket/prefix or gs://bucket/prefix, and check the credentials"
        ) from error
    return filesystem, path.rstrip("/")
