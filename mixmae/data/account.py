"""What was met when a collection of images was opened: how much is used, and what is not, by reason, with a remedy.

Every source keeps a Met for each place it was read from; `account` puts those of a run's sources together. stats prints
all of it, make_shards keeps it in the manifest, and training prints one line of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mixmae.data.source import Source

_NAMED_IN_LINE = 3


@dataclass(frozen=True)
class Note:
    """Files, members or labels of one kind that are left out, or are not used as their owner may expect."""

    what: str
    """In the plural: "files ending in .heic are left out"."""
    count: int
    example: str
    """The name of one of them."""
    remedy: str = ""
    """What to do if they should be used; empty if nothing can be done."""

    def __str__(self) -> str:
        some = self.example if self.count == 1 else f"such as {self.example}"
        return f"{self.what}: {self.count} ({some})" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Met:
    """What one place held."""

    place: str
    """The folder, file or split; a place that several sources were read from is counted once."""
    counts: Mapping[str, int]
    """How many files, tars, members, ... were looked at, by their kind in the plural."""
    notes: tuple[Note, ...] = ()

    @classmethod
    def from_json(cls, place: str, content: Any) -> Met:
        """What Account.as_json made.   Raises: TypeError, KeyError, AttributeError for anything else."""
        return cls(place, dict(content["looked_at"]), tuple(Note(**note) for note in content["notes"]))


@dataclass(frozen=True, kw_only=True)
class Account:
    """What the sources of a run, or the splits of a collection, were made of."""

    images: Mapping[str, int]
    """By split."""
    labelled: Mapping[str, int]
    """Images with a class, by split."""
    num_classes: int
    looked_at: Mapping[str, int]
    """Files, tars, members, ... by their kind."""
    notes: Sequence[Note]

    def as_json(self) -> dict[str, Any]:
        """For manifests and stats.json."""
        return {**asdict(self), "notes": [asdict(note) for note in self.notes]}

    @property
    def line(self) -> str:
        """One line: images, classes, and the most frequent of what is left out."""
        counts = ", ".join(f"{count} {split}" for split, count in self.images.items())
        classes = "no classes of whole images"
        if self.num_classes:
            unlabelled = sum(self.images.values()) - sum(self.labelled.values())
            classes = "1 class" if self.num_classes == 1 else f"{self.num_classes} classes"
            classes += f", {unlabelled} images without one" if unlabelled else ""
        if not self.notes:
            return f"{counts} images; {classes}"
        notes = sorted(self.notes, key=lambda note: -note.count)
        shown = "; ".join(f"{note.what}: {note.count} ({note.example})" for note in notes[:_NAMED_IN_LINE])
        more = f"; and {len(notes) - _NAMED_IN_LINE} kinds more" if len(notes) > _NAMED_IN_LINE else ""
        return f"{counts} images; {classes}; {shown}{more}"

    def lines(self) -> list[str]:
        """All of it: one line for each kind, with its remedy."""
        looked_at = ", ".join(f"{count} {kind}" for kind, count in self.looked_at.items())
        return [f"looked at {looked_at}", *map(str, sorted(self.notes, key=lambda note: -note.count))]


def account(sources: Mapping[str, Source]) -> Account:
    """What was met in all of these.   Args: sources: by split."""
    places = {met.place: met for source in sources.values() for met in source.met}
    looked_at: dict[str, int] = {}
    for met in places.values():
        for kind, count in met.counts.items():
            looked_at[kind] = looked_at.get(kind, 0) + count
    labels = {split: source.read_labels() for split, source in sources.items()}
    known = [values[values >= 0] for values in labels.values()]
    return Account(
        images={split: source.num_rows for split, source in sources.items()},
        labelled={split: len(values) for split, values in zip(labels, known, strict=True)},
        num_classes=len(np.unique(np.concatenate(known))) if known else 0,
        looked_at=looked_at,
        notes=merge_notes(note for met in places.values() for note in met.notes),
    )


class Tally:
    """Counts what is met, kind by kind, and makes notes of it."""

    def __init__(self) -> None:
        self._notes: dict[str, Note] = {}

    def add(self, what: str, example: str, remedy: str = "", count: int = 1) -> None:
        """Count things of one kind; the first example of it is kept."""
        before = self._notes.get(what) or Note(what, 0, escaped(example), remedy)
        self._notes[what] = replace(before, count=before.count + count)

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(self._notes.values())


def escaped(name: str) -> str:
    """A file's name as it can be printed, stored and sent: bytes that are not UTF-8 become backslash escapes."""
    try:
        stored = name.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # half of a pair, as JSON may hold it
        stored = name.encode(errors="backslashreplace")
    return stored.decode(errors="backslashreplace")


def merge_notes(notes: Iterable[Note]) -> tuple[Note, ...]:
    """One note for each kind: counts are added, the first example stays."""
    merged: dict[str, Note] = {}
    for note in notes:
        before = merged.get(note.what)
        merged[note.what] = replace(before, count=before.count + note.count) if before else note
    return tuple(merged.values())
