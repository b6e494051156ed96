"""The folder of a run that is in a store (s3://, gs://): what is there, and how it comes to the machines and from them.

A run works in a folder of its machine, the staging folder, as it does in an output folder; mirror.py copies what
belongs to the run to the store. A machine that has nothing gets from there what it needs. The store has the files of
run_folder.py under the same names, and:

checkpoints/step_N/   state.json comes last and goes first: a checkpoint without it does not count
run.lock              whose it is (store_lock.py)
.mark.PART            which staging folder is the last that the files of a part came from. There they may be newer than
                      in the store, as a store can be away; in any other folder they are old, and are not used

Two processes write, each its own part: rank 0 of the workers, on whatever node, and the driver. The journal goes from
the driver to rank 0 and back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from mixmae.lock import LOCK_FILE
from mixmae.machine import cache_folders
from mixmae.stores import connect, store_uri, without_secrets
from mixmae.training.checkpoint_files import CheckpointFiles, look_at
from mixmae.writing import writing

STATE_FILE = "state.json"
JOURNAL = "metrics.jsonl"
Part = Literal["driver", "worker", "journal"]
_BLOCK_BYTES = 8 * 1024 * 1024


class StoreError(OSError):
    """The store gives no answer, or not the one that it should; it may later."""


class DamagedCopy(ValueError):
    """What is in the store is not what was written."""


@dataclass(frozen=True)
class RunStore:
    """A run's folder in a store. Small and picklable; any process of the run may use it."""

    uri: str
    """With its endpoint and its credentials, if it has any."""
    local: Path
    """The staging folder, the same path on all nodes."""

    @classmethod
    def of(cls, place: str | Path, staging: Path | None = None) -> RunStore | None:
        """The store that a path of a command line means, or None if that is a local folder.

        Args:   staging: the folder for staging folders; None: one of this user's cache.
        Raises: ValueError if the URI is none that pyarrow knows, or there is no folder to work in.
        """
        uri = store_uri(place)
        if uri is None:
            return None
        path = connect(uri)[1]
        endpoint = parse_qs(urlsplit(uri).query).get("endpoint_override", [""])[0]
        digest = hashlib.sha256(f"{without_secrets(uri)} {endpoint}".encode()).hexdigest()[:8]
        name = f"{path.rpartition('/')[2]}-{digest}"
        places = [staging] if staging else [folder / "runs" for folder in cache_folders()]
        for folder in places:
            with contextlib.suppress(OSError):
                (folder / name).mkdir(parents=True, exist_ok=True)
                return cls(uri, (folder / name).resolve())
        raise ValueError(f"there is no folder that can be written to work in ({places[0]}): give another --staging.")

    @property
    def shown(self) -> str:
        """The URI without what is secret."""
        return without_secrets(self.uri).rstrip("/")

    @cached_property
    def _root(self) -> str:
        return connect(self.uri)[1]

    @property
    def _filesystem(self) -> Any:
        return connect(self.uri)[0]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "local": self.local}

    # single files

    def read(self, name: str) -> bytes | None:
        """A small file's content, or None if it is not there.   Raises: StoreError, as all that follow."""
        with self._asking():
            try:
                with self._filesystem.open_input_file(self._path(name)) as stream:
                    return bytes(stream.readall())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; readers see the whole of it or what was there before."""
        with self._asking(), self._filesystem.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def size(self, name: str) -> int:
        """Bytes of a file; 0 if it is not there."""
        with self._asking():
            return self._filesystem.get_file_info(self._path(name)).size or 0

    def put(self, file: Path, name: str) -> None:
        """Copy a local file of any size to the store.   Raises: FileNotFoundError if it is gone."""
        with file.open("rb") as content:
            with self._asking(), self._filesystem.open_output_stream(self._path(name)) as stream:
                while block := content.read(_BLOCK_BYTES):
                    stream.write(block)
            if self.size(name) != content.tell():
                raise StoreError(f"{self.shown}/{name} has not arrived as it was sent")

    def get(self, name: str, file: Path) -> None:
        """Copy a file of any size from the store.   Raises: FileNotFoundError if it is not there."""
        with self._asking():
            stream = self._filesystem.open_input_file(self._path(name))
        with stream, writing(file) as partial, partial.open("wb") as content:
            while True:
                with self._asking():
                    block = stream.read(_BLOCK_BYTES)
                if not block:
                    break
                content.write(block)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all files below a folder of the run, by name."""
        import pyarrow.fs as pa_fs

        top = f"{self._root}/{folder}".rstrip("/")
        selector = pa_fs.FileSelector(top, recursive=True, allow_not_found=True)
        with self._asking():
            found = self._filesystem.get_file_info(selector)
        files = (info for info in found if info.type == pa_fs.FileType.File)
        return {info.path.removeprefix(self._root).lstrip("/"): info.size for info in files}

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name))

    # folders with a state.json: checkpoints, and the best weights

    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, the newest first."""
        found = (name.split("/") for name in self.sizes("checkpoints") if name.endswith(f"/{STATE_FILE}"))
        return sorted((parts[1] for parts in found if parts[1].removeprefix("step_").isdecimal()), reverse=True)

    def put_folder(self, folder: Path, name: str) -> None:
        """Copy a folder to the store; what was there under its name does not count any more from the start."""
        self.delete(f"{name}/{STATE_FILE}")
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == STATE_FILE, file.name)):
            self.put(file, f"{name}/{file.name}")

    def get_folder(self, name: str, target: Path) -> None:
        """Copy such a folder from the store.   Raises: DamagedCopy if a byte is not what was written."""
        with writing(target) as partial:
            partial.mkdir()
            try:
                for file in self.sizes(name):
                    self.get(file, partial / file.rpartition("/")[2])
            except FileNotFoundError as error:
                raise DamagedCopy(f"{self.shown}/{name} was deleted while it was read.") from error
            if problem := look_at(partial, verify=True).problem:
                raise DamagedCopy(f"{self.shown}/{name} is damaged ({problem}): use another checkpoint.")

    def remove(self, name: str) -> None:
        """Delete such a folder, its state.json first."""
        for file in sorted(self.sizes(name), key=lambda file: not file.endswith(f"/{STATE_FILE}")):
            self.delete(file)

    def move(self, name: str, target: str) -> None:
        """Rename such a folder: it counts under one of the names at any time."""
        for file in sorted(self.sizes(name), key=lambda file: file.endswith(f"/{STATE_FILE}")):
            with self._asking():
                self._filesystem.copy_file(self._path(file), self._path(f"{target}/{file.rpartition('/')[2]}"))
        self.remove(name)

    def remove_older(self, keep: int) -> None:
        """Delete all checkpoints but the newest, and what an interrupted upload has left of others."""
        kept = set(self.checkpoints()[:keep])
        there = {name.split("/")[1] for name in self.sizes("checkpoints")}
        for name in sorted(there - kept):
            self.remove(f"checkpoints/{name}")

    def put_aside(self, folder: Path, step: int) -> None:
        """What RunFolder.put_aside has done here, there.

        Args: folder: what the run has put aside here, of which this brings what the driver did not have.
        """
        for name in self.sizes("panels"):
            file = folder / name
            if not file.exists():
                self.get(name, file)
            if _number_of(file.stem) > step:
                self.delete(name)
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith(("checkpoints/", "best/")):
                self.put(path, f"{folder.name}/{name}")
        for name in self.checkpoints():
            if _number_of(name) > step:
                self.move(f"checkpoints/{name}", f"{folder.name}/checkpoints/{name}")
        best = self.read(f"best/{STATE_FILE}")
        if best is not None and json.loads(best)["position"]["step"] > step:
            self.move("best", f"{folder.name}/best")
        self.delete(JOURNAL)
        self.write(".mark.worker", b"nobody's")  # what is in the staging folders of workers is of the other branch

    def weights(self) -> Path:
        """A copy of what to load of this place: a run's best weights, else its last checkpoint; a folder, or a file.

        Raises: ValueError for a run without a checkpoint, or a damaged one; FileNotFoundError.
        """
        there = self.sizes()
        folder = ""
        if "run.json" in there:
            names = [f"checkpoints/{name}" for name in self.checkpoints()]
            folder = "best" if f"best/{STATE_FILE}" in there else next(iter(names), "")
            if not folder:
                raise ValueError(f"{self.shown} is a run without a checkpoint yet: let it train on, or choose another.")
        elif not there:
            if not self.size(""):
                raise FileNotFoundError(f"{self.shown} is not there: check the address.")
            file = self.local / ".weights" / self._root.rpartition("/")[2]
            self.get("", file)
            return file
        stem = f"{folder}/" if folder else ""
        target = self.local / ".weights" / (folder or self._root.rpartition("/")[2])
        state = self.read(f"{stem}{STATE_FILE}")
        if state is None:  # such as a hub folder
            for name in there:
                self.get(name, target / name)
        elif not (target / STATE_FILE).is_file() or (target / STATE_FILE).read_bytes() != state:
            self.get_folder(folder, target)
        return target

    # parts, and who has written them last

    def bring(self, part: Literal["driver", "worker"]) -> None:
        """Have the files of a part, and the journal, in the staging folder, which they are written from from now on.

        Checkpoints and weights stay in the store: get_folder brings those that are needed.
        """
        mark, own = self.read(f".mark.{part}"), self.local / f".mark.{part}"
        if mark is None or not own.is_file() or own.read_bytes() != mark:
            for path in self.local.iterdir():
                if part_of(path.name) == part and (path.is_dir() and not path.is_symlink()):
                    shutil.rmtree(path)
                elif part_of(path.name) == part:
                    path.unlink()
        new = secrets.token_hex(8).encode()
        self.write(own.name, new)
        own.write_bytes(new)
        for name in self.sizes():
            if part_of(name) == part and _is_needed(name) and not (self.local / name).exists():
                self.get(name, self.local / name)
        self.bring_journal()

    def has(self, part: Part) -> bool:
        """Whether this staging folder is still the one that a part is written from."""
        own = self.local / f".mark.{part}"
        return own.is_file() and own.read_bytes() == self.read(own.name)

    def bring_initial(self) -> None:
        """Have the weights that a run starts from on this node, if the driver is on another one."""
        if not self.has("driver"):
            for name in self.sizes():
                if "/" not in name and name.endswith(".safetensors"):
                    self.get(name, self.local / name)

    def bring_results(self) -> None:
        """Have what rank 0 has made of a run, as far as the driver looks at it, if that was on another node."""
        panels = sorted(name for name in self.sizes("panels") if part_of(name))
        for name in [f"best/{STATE_FILE}", *panels[-1:]]:
            content, file = self.read(name), self.local / name
            if content is not None and not (file.is_file() and file.read_bytes() == content):
                with writing(file) as partial:
                    partial.write_bytes(content)

    def bring_records(self) -> None:
        """Have here what tells how a run is (pipelines/status.py); nothing is written there."""
        for name in self.sizes():
            folder, _, file = name.rpartition("/")
            is_record = not folder or (folder.startswith("left_") and "/" not in folder)
            if is_record and not file.endswith((".png", ".safetensors")):
                self.get(name, self.local / name)

    def look_at(self, name: str, *, verify: bool) -> CheckpointFiles:
        """As checkpoint_files.look_at, of a checkpoint in the store; without `verify`, at the names alone."""
        path, sizes = self.local / name, self.sizes(f"checkpoints/{name}")
        problem = ""
        if verify:
            try:
                self.get_folder(f"checkpoints/{name}", path)
                return look_at(path, verify=True)
            except DamagedCopy as error:
                problem = str(error)
        state = json.loads(self.read(f"checkpoints/{name}/{STATE_FILE}") or b"{}")
        missing = [file for file in state.get("files", {}) if f"checkpoints/{name}/{file}" not in sizes]
        return CheckpointFiles(
            path=path,
            step=state.get("position", {}).get("step"),
            num_bytes=sum(sizes.values()),
            problem=problem or (f"{missing[0]} is missing" if missing else ""),
            checked="bytes" if verify else "names",
            has_digests="files" in state,
        )

    def bring_journal(self) -> None:
        """Have what the store has of the journal in the staging folder's."""
        file = self.local / JOURNAL
        ours, theirs = file.read_bytes() if file.exists() else b"", self.read(JOURNAL) or b""
        if (both := merged(theirs, ours)) != ours:
            with writing(file) as partial:
                partial.write_bytes(both)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        except Exception as error:
            import pyarrow as pa

            if not isinstance(error, (pa.ArrowException, OSError)):
                raise
            reason = " ".join(str(error).split())[:300]
            raise StoreError(
                f"{self.shown} gives no answer, or refuses ({reason}): check the address, the credentials and the "
                "endpoint."
            ) from error


def part_of(name: str) -> Part | None:
    """Which part a file of a run belongs to; None if it is of one machine alone."""
    first = name.partition("/")[0]
    if any(part.startswith(".") for part in name.split("/")) or first.startswith(LOCK_FILE):
        return None
    if name == JOURNAL:
        return "journal"
    is_worker = first in ("checkpoints", "best", "panels", "diverged") or first.startswith("stacks_")
    return "worker" if is_worker else "driver"


def _number_of(name: str) -> int:
    """The step in step_N."""
    return int(name.removeprefix("step_"))


def _is_needed(name: str) -> bool:
    """Whether a file of the store is one that a run that goes on looks at."""
    first, _, rest = name.partition("/")
    is_large = first in ("checkpoints", "diverged", "damaged") or rest.startswith(("checkpoints/", "best/"))
    return not is_large and (first != "best" or rest == STATE_FILE)


def merged(theirs: bytes, ours: bytes) -> bytes:
    """Two copies of a journal, of which each may have lines at its end that the other one lacks, as one.

    Two that do not begin alike are of different branches of a run: then it is theirs, that of the store.
    """
    same, beyond = 0, min(len(theirs), len(ours)) + 1
    while beyond - same > 1:
        middle = (same + beyond) // 2
        same, beyond = (middle, beyond) if theirs.startswith(ours[:middle]) else (same, middle)
    if same == len(theirs):
        return ours
    if same == len(ours):
        return theirs
    whole = ours.rfind(b"\n", 0, same) + 1
    return theirs + ours[whole:] if whole else theirs


def links_of(folder: Path, target: Path) -> Path:
    """A second name for a folder's files, by which they stay while the folder is deleted; returns the target."""
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    shutil.copytree(folder, target, copy_function=_link)
    return target


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every filesystem can
        shutil.copy2(source, target)
