"""Show what a collection of images contains: count, sizes, classes, mean and std of the pixels, broken files.

    python pipelines/stats.py SOURCE [--output DIR]

SOURCE is whatever open_source takes (docs/data.md). Every image is decoded once, so that the list of broken files is
complete; --sample N decodes only N rows, chosen by a hash. Writes stats.json and contact_sheet.png. Of a set with
objects (docs/detection.md) their numbers, sizes and classes are counted, too, and objects.png shows some of them; of
one with masks of classes (docs/segmentation.md) each class's share of the pixels, and masks.png shows some.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

from mixmae.data.account import account
from mixmae.data.chunks import Int64Array, group_by_chunk
from mixmae.data.images.decode import Uint8Array
from mixmae.data.images.summary import Summary
from mixmae.data.order import Draw, permutation
from mixmae.data.source import DataError, Source
from mixmae.data.sources import layout_of, list_splits, open_source
from mixmae.data.sources.storage import plain_place, writable_folder
from mixmae.machine import usable_cores
from mixmae.writing import write_json, writing
from pipelines.command import command

SHEET_SIDE = 8
"""Images in a row and rows of the contact sheet."""
CELL_PX, CAPTION_PX = 128, 14
_NAMED = 10
"""Classes and broken files that are printed; stats.json has all."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    source: tyro.conf.Positional[str]
    """Folder of images, tars or Parquet files; a list of files (.txt); a glob; a JSON list of sources; a URI."""
    output: str = "stats"
    """Folder for stats.json and contact_sheet.png."""
    sample: int | None = None
    """Look at this many images of each split, chosen by a hash, instead of all."""
    seed: int = 0
    """Of the sample and of the contact sheet."""
    workers: int = 0
    """Threads that decode; 0 means one per core."""


@dataclass(frozen=True)
class _Part:
    """What one task found."""

    summary: Summary
    thumbnails: dict[int, tuple[Uint8Array, int]]
    """Small images for the contact sheet, with their labels, by row."""


def stats(
    source: str,
    output: str | Path,
    *,
    sample: int | None = None,
    seed: int = 0,
    workers: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Summarise every split of a collection and draw its contact sheet.

    Args:   source: what open_source takes.  output: folder for stats.json and contact_sheet.png, made if missing.
            sample: look only at so many images of each split.  seed: of the sample and of the contact sheet.
            workers: threads that decode; 0 means one per core.  report: gets the printed lines.
    Returns: what stats.json holds.   Raises: DataError if there is no such collection or no writable folder.
    """
    if sample is not None and sample < 1:
        raise DataError(f"sample is {sample}: give the number of images to look at, or leave it out to look at all")
    if workers < 0:
        raise DataError(f"workers is {workers}: give how many threads decode, or 0 for one per core")
    # --help does without torch
    from pipelines.maps import count_maps, draw_maps, has_maps, map_lines
    from pipelines.objects import count_objects, draw_page, has_objects, object_lines

    sources = {split: open_source(source, split) for split in list_splits(source)}
    folder = writable_folder(output)
    known = {}
    for split, opened in sources.items():  # before the account, which then has what was met in the objects, too
        try:
            known[split] = {"objects": has_objects(opened), "masks": has_maps(opened)}
        except DataError as error:  # what is wrong with masks or objects does not hide the rest
            report(f"note: of the {split} images no masks or objects: {error}")
            known[split] = {}
    met = account(sources)
    for line in met.lines():
        report(line)
    content: dict[str, Any] = {"source": plain_place(source), "layout": layout_of(source), "met": met.as_json()}
    content["splits"] = {}
    sheet: tuple[Source, dict[int, tuple[Uint8Array, int]]] | None = None
    pages: dict[str, Image.Image | None] = {}
    for split, opened in sources.items():
        summary, thumbnails = _look(opened, sample, seed, workers, report)
        entry = {"name": opened.name, "digest": opened.digest, "rows": opened.num_rows}
        content["splits"][split] = {**entry, "looked_at": summary.num_images, **summary.as_dict(opened.class_names)}
        for line in _lines(split, content["splits"][split], is_dense=any(known[split].values())):
            report(line)
        chosen = permutation(opened.num_rows, Draw.HOLDOUT, seed)[:sample]
        for kind, count, lines_of, draw in (
            ("objects", count_objects, object_lines, draw_page),
            ("masks", count_maps, map_lines, draw_maps),
        ):
            if known[split].get(kind):
                content["splits"][split][kind] = count(opened, np.sort(chosen))
                for line in lines_of(content["splits"][split][kind]):
                    report(line)
                pages[kind] = pages.get(kind) or draw(opened, chosen)
        sheet = sheet or (opened, thumbnails)
    write_json(folder / "stats.json", content)
    if sheet is not None:
        with writing(folder / "contact_sheet.png") as partial:
            draw_contact_sheet(sheet[1], sheet[0].class_names).save(partial)
    written = [folder / "stats.json", folder / "contact_sheet.png"]
    for kind, page in pages.items():
        if page is not None:
            written.append(folder / f"{kind}.png")
            with writing(written[-1]) as partial:
                page.save(partial)
    report(f"written: {', '.join(map(str, written))}")
    return content


def draw_contact_sheet(
    thumbnails: dict[int, tuple[Uint8Array, int]], class_names: tuple[str, ...] | None
) -> Image.Image:
    """A grid of images in the order of their rows, each with its class below it.

    Args: thumbnails: by row, (h, w, 3) uint8 of at most CELL_PX per side, and the label.
    """
    columns = min(SHEET_SIDE, max(1, len(thumbnails)))
    rows = max(1, -(-len(thumbnails) // columns))
    sheet = Image.new("RGB", (columns * CELL_PX, rows * (CELL_PX + CAPTION_PX)), (32, 32, 32))
    pen = ImageDraw.Draw(sheet)
    for index, row in enumerate(sorted(thumbnails)):
        pixels, label = thumbnails[row]
        x, y = index % columns * CELL_PX, index // columns * (CELL_PX + CAPTION_PX)
        sheet.paste(
            Image.fromarray(pixels), (x + (CELL_PX - pixels.shape[1]) // 2, y + (CELL_PX - pixels.shape[0]) // 2)
        )
        if label >= 0:
            text = class_names[label] if class_names and label < len(class_names) else f"class {label}"
            pen.text((x + 3, y + CELL_PX + 1), text[:20], fill=(235, 235, 235))
    return sheet


def _look(
    source: Source, sample: int | None, seed: int, workers: int, report: Callable[[str], None]
) -> tuple[Summary, dict[int, tuple[Uint8Array, int]]]:
    """The summary of a source's rows, or of a sample, and thumbnails of some rows."""
    order = permutation(source.num_rows, Draw.HOLDOUT, seed)
    rows = np.sort(order[:sample]) if sample is not None else np.arange(source.num_rows)
    # A few more than the sheet shows, for the broken ones among them.
    shown = set(order[: 2 * SHEET_SIDE**2].tolist())
    chunks, within = source.chunks.locate(rows)

    def look(group: Int64Array) -> _Part:
        part = _Part(Summary(), {})
        samples = source.read(int(chunks[group[0]]), within[group])
        for row, found in zip(rows[group].tolist(), samples, strict=True):
            pixels = part.summary.add(found.data, found.label, found.where, decode=True, problem=found.problem)
            if pixels is not None and row in shown:
                part.thumbnails[row] = _small(pixels), found.label
        return part

    whole = Summary()
    thumbnails: dict[int, tuple[Uint8Array, int]] = {}
    reported = time.monotonic()
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for part in pool.map(look, group_by_chunk(chunks)):
            whole.merge(part.summary)
            thumbnails |= part.thumbnails
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                report(f"{whole.num_images} of {len(rows)} images, {len(whole.broken)} broken")
    chosen = [row for row in order[: 2 * SHEET_SIDE**2].tolist() if row in thumbnails][: SHEET_SIDE**2]
    return whole, {row: thumbnails[row] for row in chosen}


def _small(pixels: Uint8Array) -> Uint8Array:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((CELL_PX - 8, CELL_PX - 8))
    return np.asarray(image)


def _lines(split: str, entry: dict[str, Any], *, is_dense: bool) -> Iterator[str]:
    """What is printed about one split.   Args: is_dense: whether it has classes of objects or pixels."""
    looked = "" if entry["looked_at"] == entry["rows"] else f" ({entry['looked_at']} looked at)"
    yield f"{split}: {entry['rows']} images{looked}, {entry['bytes'] / 1e6:.1f} MB, digest {entry['digest']}"
    if entry["smallest_px"]:
        small, large = (" x ".join(map(str, entry[key])) for key in ("smallest_px", "largest_px"))
        yield f"  sizes from {small} to {large} px; by the shorter side:"
        peak = max(entry["shorter_side_px"].values())
        for edge, count in entry["shorter_side_px"].items():
            if count:
                yield f"    {edge:>5} px and more  {count:>9}  {'#' * max(1, round(40 * count / peak))}"
    if entry["pixels"]:
        mean, std = (" ".join(f"{value:.3f}" for value in entry["pixels"][key]) for key in ("mean", "std"))
        yield f"  pixels (0 to 1, R G B): mean {mean}, std {std},"
        yield f"    of {entry['pixels']['images']} images, {entry['pixels']['grey']} of them grey"
    classes = entry["classes"]
    if classes:
        counts = sorted(classes.values())
        yield f"  {len(classes)} classes of {counts[0]} to {counts[-1]} images; {entry['unlabelled']} without a class"
        for name, count in sorted(classes.items(), key=lambda item: -item[1])[:_NAMED]:
            yield f"    {count:>9}  {name}"
        if len(classes) > _NAMED:
            yield f"    and {len(classes) - _NAMED} more in stats.json"
    elif not is_dense:
        yield "  no classes"
    broken = entry["broken"]
    share = 100 * len(broken) / max(1, entry["looked_at"])
    yield f"  {len(broken)} broken ({share:.2f} %)"
    for record in broken[:_NAMED]:
        yield f"    {record['where']}: {record['reason']}"
    if len(broken) > _NAMED:
        yield f"    and {len(broken) - _NAMED} more in stats.json"


def run(arguments: Arguments) -> int:
    """Returns: the process's exit status."""
    stats(**vars(arguments))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="stats.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
