"""What the pipelines that look through a frozen encoder have in common: which encoder, where, and its features."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mixmae.convert import Preprocessing, build_model, digest_of, read_weights
from mixmae.data.blocks import ImageBatch, eval_batches
from mixmae.data.chunks import Int64Array
from mixmae.data.source import Source
from mixmae.encoders.base import Encoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.probing.features import LabelledBatch, extract_features
from pipelines.runs import weights_of

SAY_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """An encoder ready to look at images in evaluation's fixed transform."""

    encoder: Encoder
    preprocessing: Preprocessing
    resize_share: float
    device: torch.device
    bfloat16: bool = False
    batch_size: int = 64
    path: Path | None = None
    """Where its weights come from."""
    digest: str = ""
    """Of its own weights, without a head or a decoder: the same whichever file they were read from."""
    run_id: str | None = None
    """The MLflow run that they are of, if they say so."""

    @property
    def width(self) -> int:
        return self.encoder.channels[-1]

    def batches(self, source: Source, rows: Int64Array | None = None) -> Iterator[ImageBatch]:
        """All images, or these rows, decoded by threads one batch ahead of the encoder."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            size, share = self.preprocessing.image_size, self.resize_share
            yield from ahead(
                eval_batches(source, size, batch_size=self.batch_size, rows=rows, resize_share=share, pool=pool)
            )

    def pool(self, batches: Iterable[LabelledBatch]) -> tuple[Tensor, Tensor]:
        """Pooled features (N, D) float32 and labels (N,) int64 of batches; broken images have label -1."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return extract_features(self.encoder, batches, mean=self.preprocessing.mean, std=self.preprocessing.std)

    def features(self, source: Source, rows: Int64Array | None = None) -> tuple[Tensor, Tensor]:
        """As `pool`, of a source; says how it goes on."""
        total = source.num_rows if rows is None else len(rows)
        return self.pool(saying(self.batches(source, rows), total, f"features of {source.name}"))


def load_frozen(
    path: Path,
    *,
    device: Literal["auto", "cpu", "gpu"] = "auto",
    resize_share: float = 0.875,
    batch_size: int = 64,
    bfloat16: bool = False,
) -> FrozenEncoder:
    """Build the encoder of a run's folder, a checkpoint, an encoder file, a hub folder or weights of other formats.

    Raises: ValueError if there is none in it, the file is damaged, or its architecture is not known; FileNotFoundError.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}: it must be at least 1.")
    if not 0 < resize_share <= 1:
        raise ValueError(f"--resize-share is {resize_share}: it must be in (0, 1], 0.875 is usual.")
    place = choose_place(device)
    file = weights_of(path.expanduser())
    model, metadata = build_model(read_weights(file), file)
    encoder: Any = model.encoder if isinstance(model, ImageClassifier) else model
    run_id = metadata.source.get("run_id")
    return FrozenEncoder(
        encoder=encoder.to(place),
        preprocessing=metadata.preprocessing,
        resize_share=resize_share,
        device=place,
        bfloat16=bfloat16,
        batch_size=batch_size,
        path=file,
        digest=digest_of(encoder.state_dict()),
        run_id=str(run_id) if run_id else None,
    )


def choose_place(device: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """Where this process computes.   Raises: ValueError if a GPU is asked for and there is none."""
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: leave --device out, or give --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def saying(batches: Iterable[ImageBatch], total: int, what: str) -> Iterator[ImageBatch]:
    """Pass batches on, with a line now and then and at the end of what took long enough for one."""
    start = said = time.monotonic()
    count = broken = 0
    for batch in batches:
        yield batch
        count, broken = count + len(batch.images), broken + len(batch.broken)
        now = time.monotonic()
        if now - said > SAY_EVERY_S or (count == total and said > start):
            said = now
            print(f"{what}: {count}/{total} images, {count / (now - start):.0f} images/s", flush=True)
    if broken:
        print(f"note: {broken} images of {total} could not be decoded and are left out", flush=True)


Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, the next one made by a thread while the last one is used."""
    with ThreadPoolExecutor(1) as maker:
        pending = maker.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = maker.submit(next, items, None)
            yield item
