"""What evaluate.py and predict.py do with a segmentation run: scores of a set with masks, masks of any images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from mixmae.data.blocks import BrokenRecord
from mixmae.data.broken import name_broken
from mixmae.data.channels import check_channels
from mixmae.data.images.decode import DecodeError, Uint8Array, decode_image
from mixmae.data.pairs import Pair, read_pairs
from mixmae.data.source import DataError, Sample, Source, read_rows
from mixmae.data.sources import list_splits, open_source
from mixmae.data.truth import dense_classes, encode_map, with_maps
from mixmae.jobs.segmentation import EVAL_IMAGES, judge, panel_of, write_classes
from mixmae.jobs.segmenter import Segmenter
from mixmae.jobs.supervised import WORST, WORST_FILE
from mixmae.segmentation.pictures import overlay, palette
from mixmae.segmentation.scores import pixel_scores
from mixmae.training.run_folder import weights_of
from mixmae.writing import write_json, writing_table


def evaluate_segmentation(segmenter: Segmenter, source: Source, model: Path, folder: Path) -> int:
    """Score a model on images with masks: metrics.json, classes.csv, worst.png.

    Raises: DataError for a set without masks, or of other classes.
    """
    check_channels(source, segmenter.channels)
    dense = with_maps(source)
    known = dense_classes(source)
    if known is None or known.pixels != segmenter.class_names:
        raise DataError(
            f"{source.name} has other classes than the model ({len(known.pixels or ()) if known else 0} and "
            f"{len(segmenter.class_names)}): evaluate it on the classes that it was trained for."
        )
    num_classes = len(segmenter.class_names)
    confusion, loss = torch.zeros(num_classes, num_classes, dtype=torch.int64), 0.0
    broken: list[BrokenRecord] = []
    worst: list[tuple[float, Pair]] = []
    start = time.monotonic()
    rows = np.arange(source.num_rows)
    for batch in read_pairs(dense, rows, channels=segmenter.channels, batch_size=EVAL_IMAGES):
        broken += [item for item in batch if isinstance(item, BrokenRecord)]
        for pair in (item for item in batch if isinstance(item, Pair)):
            counted, summed, (share,) = judge(segmenter, [pair])
            confusion += counted.cpu()
            loss += summed.item()
            worst.append((share, pair))
        worst = sorted(worst, key=lambda item: item[0])[:WORST]
    images_per_s = (len(rows) - len(broken)) / (time.monotonic() - start)
    if not confusion.sum():
        raise DataError(f"no pixel of {source.name} has a class: there is nothing to judge by.")
    scores = pixel_scores(confusion)
    metrics: dict[str, Any] = {"miou": scores.miou, "macc": scores.macc, "aacc": scores.aacc}
    metrics["loss"] = loss / int(confusion.sum())
    absent = [name for name, count in zip(segmenter.class_names, scores.pixels.tolist(), strict=True) if not count]
    content = {
        "model": str(weights_of(model)),
        "data": {"name": source.name, "digest": source.digest},
        **metrics,
        "num_judged": len(rows) - len(broken),
        "num_broken": len(broken),
        "absent_classes": absent,
        "images_per_s": images_per_s,
    }
    write_json(folder / "metrics.json", content)
    with writing_table(folder / "classes.csv") as table:
        write_classes(table, segmenter.class_names, scores)
    panel_of(segmenter, [pair for _, pair in worst]).save(folder / WORST_FILE)
    print(
        f"{weights_of(model)} on {source.name}: mIoU {scores.miou:.2%}, mean accuracy {scores.macc:.2%}, "
        f"pixel accuracy {scores.aacc:.2%}, loss {metrics['loss']:.4f}\n"
        f"{content['num_judged']} images judged; {images_per_s:.1f} images/s on {segmenter.device.type}\n"
        f"{folder}: metrics.json, classes.csv, {WORST_FILE}"
    )
    if absent:
        print(f"{len(absent)} classes are in no mask, and in no mean of accuracies: {', '.join(absent[:5])}")
    if broken:
        print(f"left out: {name_broken(broken, source.num_rows)}")
    return 0


def predict_segmentation(segmenter: Segmenter, images: str, folder: Path) -> int:
    """Find the classes of images without masks: masks/*.png of class indices, overlays/*.png, predictions.csv."""
    sources = [open_source(images, split) for split in list_splits(images)]
    colours = palette(segmenter.class_names)
    broken: list[BrokenRecord] = []
    count = 0
    names: set[str] = set()
    with writing_table(folder / "predictions.csv") as table:
        table.writerow(["file", "mask", "classes", "problem"])
        for number, source in enumerate(sources):
            check_channels(source, segmenter.channels)
            for row, sample, pixels in decoded(source, segmenter.channels):
                count += 1
                if isinstance(pixels, str):
                    broken.append(BrokenRecord(row, sample.where, pixels))
                    table.writerow([sample.where, "", "", pixels])
                    continue
                (indices,) = segmenter.predict([pixels])
                name = stored_name(sample.path, f"{number}_{row:07d}", names)
                for kind in ("masks", "overlays"):
                    (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / "masks" / f"{name}.png").write_bytes(encode_map(indices))
                overlay(pixels, indices, colours).save(folder / "overlays" / f"{name}.png")
                table.writerow([sample.where, f"masks/{name}.png", _shares(indices, segmenter.class_names), ""])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in segmenter.class_names), encoding="utf-8")
    if len(broken) == count:
        raise DataError(f"no image of {images} could be decoded, for example {broken[0].where}: {broken[0].reason}.")
    print(f"{folder}: predictions.csv ({count} images), masks/ (class indices; classes.txt has their names), overlays/")
    if broken:
        print(f"no mask: {name_broken(broken, count)}")
    return 0


def stored_name(path: str, otherwise: str, taken: set[str]) -> str:
    """A name for an image's mask, without suffix: its path below the output folder, which no other image has."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    name = str(PurePosixPath(*parts).with_suffix("")) if parts else otherwise
    if name in taken:  # x.jpg and x.png, or the same file in two sources
        name = f"{name}_{otherwise}"
    taken.add(name)
    return name


def decoded(source: Source, channels: int) -> Iterator[tuple[int, Sample, Uint8Array | str]]:
    """Each row with its pixels, or with why there are none."""
    for start in range(0, source.num_rows, EVAL_IMAGES):
        rows = range(start, min(start + EVAL_IMAGES, source.num_rows))
        for row, sample in zip(rows, read_rows(source, rows), strict=True):
            try:
                yield row, sample, decode_image(sample.data, channels)
            except DecodeError as error:
                yield row, sample, sample.problem or str(error)


def _shares(indices: Uint8Array, names: Sequence[str]) -> str:
    """The classes in an image, the largest first, with their shares of its pixels."""
    counts = np.bincount(indices.ravel(), minlength=len(names))
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    return "; ".join(f"{names[index]} {counts[index] / indices.size:.4f}" for index in order)
