"""Trained models ready to look at images: a classifier, a frozen encoder, and tables of an encoder's features.

Legend: N images, D the encoder's last width, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mixmae.convert import EncoderMetadata, Preprocessing, build_model, digest_of, read_weights
from mixmae.data.blocks import BrokenRecord, ImageBatch, eval_batches
from mixmae.data.broken import NothingDecodes, name_broken
from mixmae.data.chunks import Int64Array
from mixmae.data.images.augment import centre_crop
from mixmae.data.images.decode import MODES, DecodeError, Uint8Array, decode_image
from mixmae.data.source import Sample, Source, read_rows
from mixmae.encoders.base import Encoder
from mixmae.finetune.classification import ImageClassifier
from mixmae.machine import Device, threads_per_process, usable_cores
from mixmae.probing.features import LabelledBatch, extract_features, predict_logits
from mixmae.training.checkpoint import upgraded
from mixmae.training.run_folder import weights_of

CROP_PCT = 0.875
"""Side of the central crop over that of the resized image, where nothing else is known: 224 / 256."""
REPORT_EVERY_S = 15.0
"""Seconds between two lines about the progress."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier ready to look at images in evaluation's fixed transform."""

    model: ImageClassifier
    metadata: EncoderMetadata
    class_names: tuple[str, ...] | None
    crop_pct: float
    device: torch.device
    batch_size: int = 64

    @property
    def num_classes(self) -> int:
        return self.model.head.out_features

    def name_of(self, label: int) -> str:
        """The name of a class; its index if the classes have no names."""
        return str(label) if self.class_names is None else self.class_names[label]

    def logits(self, source: Source) -> Judged:
        """Score all images of a source: (N, C) float32.   Raises: NothingDecodes if all are broken."""
        preprocessing, record = self.metadata.preprocessing, _Record(source)
        batches = decoded(
            source,
            preprocessing,
            channels=self.model.encoder.in_channels,
            crop_pct=self.crop_pct,
            batch_size=self.batch_size,
        )
        scores, labels = predict_logits(
            self.model, record.reading(batches), mean=preprocessing.mean, std=preprocessing.std
        )
        return record.judged(scores, labels)


@dataclass(frozen=True, kw_only=True)
class FrozenEncoder:
    """An encoder ready to look at images in evaluation's fixed transform."""

    encoder: Encoder
    preprocessing: Preprocessing
    crop_pct: float
    device: torch.device
    bfloat16: bool = False
    batch_size: int = 64
    path: Path | None = None
    """Where its weights come from."""
    digest: str = ""
    """Digest of its own weights, without a head or a decoder: the same whichever file they were read from."""
    run_id: str | None = None
    """The MLflow run that the weights are of, if the file says so."""

    @property
    def width(self) -> int:
        return self.encoder.channels[-1]

    def pool(self, batches: Iterable[LabelledBatch]) -> tuple[Tensor, Tensor]:
        """Pooled features (N, D) float32 and labels (N,) int64 of batches."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return extract_features(self.encoder, batches, mean=self.preprocessing.mean, std=self.preprocessing.std)

    def features(self, source: Source, rows: Int64Array | None = None) -> Judged:
        """As `pool`, of a source's images, all or these rows; prints the progress, and names what is broken.

        Raises: NothingDecodes if all images are broken.
        """
        total, record = source.num_rows if rows is None else len(rows), _Record(source)
        batches = decoded(
            source,
            self.preprocessing,
            channels=self.encoder.in_channels,
            crop_pct=self.crop_pct,
            batch_size=self.batch_size,
            rows=rows,
        )
        judged = record.judged(*self.pool(record.reading(_reported(batches, total, f"features of {source.name}"))))
        if judged.broken:
            print(f"left out: {name_broken(judged.broken, total)}", flush=True)
        return judged


class Judged(NamedTuple):
    """What a model made of a source's images; broken ones are left out."""

    values: Tensor
    """(N, C) logits or (N, D) features, float32."""
    labels: Tensor
    """(N,) int64, -1 = not known."""
    rows: Tensor
    """(N,) int64, of the source."""
    broken: tuple[BrokenRecord, ...]
    """The images that could not be used."""


class _Record:
    """Keeps which images went through a model, and which are broken."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._rows: list[Tensor] = []
        self._broken: list[BrokenRecord] = []

    def reading(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches.   Raises: NothingDecodes at their end, if all images were broken."""
        for batch in batches:
            self._rows.append(batch.rows)
            self._broken.extend(batch.broken)
            yield batch
        if self._broken and not any(len(rows) for rows in self._rows):
            raise NothingDecodes(self._source, self._broken)

    def judged(self, values: Tensor, labels: Tensor) -> Judged:
        """With what the model made of them."""
        return Judged(values, labels, torch.cat(self._rows), tuple(self._broken))


def load_classifier(
    path: Path,
    *,
    device: Device = "auto",
    crop_pct: float | None = None,
    batch_size: int = 64,
    key: str | None = None,
) -> Classifier:
    """Build a classifier from what finetuning or export wrote, or from official finetuned weights.

    Args:
        crop_pct: None takes the value of the run that the weights are of, or of their file, else 0.875.
        key: of one of several sets of weights in the file, as in convert.read_weights.
    Raises: ValueError if there is none in it, or an option is out of range; FileNotFoundError.
    """
    _check(batch_size, crop_pct)
    place = choose_device(device)
    file = weights_of(path.expanduser())
    model, metadata = _build(file, key)
    if not isinstance(model, ImageClassifier):
        raise ValueError(f"{file} holds an encoder without a classifier: finetune it first (pipelines/finetune.py).")
    names = metadata.source.get("classes")
    if crop_pct is None:
        usual = metadata.preprocessing.crop_pct or CROP_PCT
        crop_pct = upgraded(metadata.source.get("config", {})).get("crop_pct", usual)
    return Classifier(
        model=model.to(place),
        metadata=metadata,
        class_names=tuple(names) if names else None,
        crop_pct=crop_pct,
        device=place,
        batch_size=batch_size,
    )


def load_frozen(
    path: Path,
    *,
    device: Device = "auto",
    crop_pct: float | None = None,
    batch_size: int = 64,
    bfloat16: bool = False,
    key: str | None = None,
) -> FrozenEncoder:
    """Build the encoder of a run's folder, a checkpoint, an encoder file, a hub folder or weights of other formats.

    Args: crop_pct: None takes the value of the file, else 0.875.  key: as in load_classifier.
    Raises: ValueError if there is none in it, the file is damaged, its architecture is not known, or an option is out
        of range; FileNotFoundError.
    """
    _check(batch_size, crop_pct)
    place = choose_device(device)
    file = weights_of(path.expanduser())
    model, metadata = _build(file, key)
    encoder: Any = model.encoder if isinstance(model, ImageClassifier) else model
    run_id = metadata.source.get("run_id")
    return FrozenEncoder(
        encoder=encoder.to(place),
        preprocessing=metadata.preprocessing,
        crop_pct=crop_pct or metadata.preprocessing.crop_pct or CROP_PCT,
        device=place,
        bfloat16=bfloat16,
        batch_size=batch_size,
        path=file,
        digest=digest_of(encoder.state_dict()),
        run_id=str(run_id) if run_id else None,
    )


def _build(file: Path, key: str | None) -> tuple[torch.nn.Module, EncoderMetadata]:
    """The model of a file.   Raises: ValueError if there is none, or none for images as they are decoded."""
    model, metadata = build_model(read_weights(file, key=key), file)
    if metadata.encoder.in_channels not in MODES:
        raise ValueError(
            f"{file} is for images of {metadata.encoder.in_channels} channels, and image files are read as 1 (grey), 3 "
            "(RGB) or 4 (RGBA): finetune it with --encoder.in-channels, or use mixmae.convert.load_encoder in Python."
        )
    return model, metadata


def _check(batch_size: int, crop_pct: float | None) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}: it must be at least 1.")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct is {crop_pct}: it must be in (0, 1], 0.875 is usual.")


def choose_device(device: Device) -> torch.device:
    """Where this process computes.   Raises: ValueError if a GPU is asked for and there is none."""
    if device == "gpu" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: leave --device out, or give --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def decoded(
    source: Source,
    preprocessing: Preprocessing,
    *,
    channels: int,
    crop_pct: float,
    batch_size: int,
    rows: Int64Array | None = None,
) -> Iterator[ImageBatch]:
    """Batches of a source's images, all or these rows, decoded by threads one batch ahead of the model."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        batches = eval_batches(
            source,
            preprocessing.image_size,
            batch_size=batch_size,
            rows=rows,
            crop_pct=crop_pct,
            channels=channels,
            pool=pool,
        )
        yield from ahead(batches)


Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while the last one is used."""
    with ThreadPoolExecutor(1) as maker:
        pending = maker.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = maker.submit(next, items, None)
            yield item


def _reported(batches: Iterable[ImageBatch], total: int, what: str) -> Iterator[ImageBatch]:
    """Pass batches on, and print a line every REPORT_EVERY_S seconds and at the end of what took longer than that."""
    start = printed = time.monotonic()
    count = 0
    for batch in batches:
        yield batch
        count += len(batch.images) + len(batch.broken)
        now = time.monotonic()
        if now - printed > REPORT_EVERY_S or (count == total and printed > start):
            printed = now
            print(f"{what}: {count}/{total} images, {count / (now - start):.0f} images/s", flush=True)


@dataclass(frozen=True)
class _DecodedRows:
    """The images of a batch that decode: a LabelledBatch, and where each was found."""

    images: Tensor
    labels: Tensor
    samples: list[tuple[int, Sample]]
    """(row, what is stored there) of each."""


class Embedder:
    """An encoder that turns rows of a source into a table of features."""

    def __init__(self, frozen: FrozenEncoder, source: Source, num_processes: int = 1) -> None:
        """Args: num_processes: those that may decode on the same cores, this one included."""
        self._frozen, self._source = frozen, source
        self._pool = ThreadPoolExecutor(threads_per_process(num_processes), "decode")

    def __call__(self, rows: Int64Array) -> pa.Table:
        """The features of these rows, in order; rows that do not decode are left out."""
        step = self._frozen.batch_size
        loaded = (self._load(rows[start : start + step]) for start in range(0, len(rows), step))
        tables = [self._embed(batch) for batch in ahead(loaded) if batch.samples]
        return pa.concat_tables(tables) if tables else feature_schema(self._frozen.width).empty_table()

    def _load(self, rows: Int64Array) -> _DecodedRows:
        samples = read_rows(self._source, rows)
        kept = [
            (image, row, sample)
            for image, row, sample in zip(self._pool.map(self._decode, samples), rows.tolist(), samples, strict=True)
            if image is not None
        ]
        images = np.stack([image for image, _, _ in kept]) if kept else np.empty(0, dtype=np.uint8)
        labels = torch.tensor([sample.label for _, _, sample in kept], dtype=torch.int64)
        return _DecodedRows(torch.from_numpy(images), labels, [(row, sample) for _, row, sample in kept])

    def _decode(self, sample: Sample) -> Uint8Array | None:
        try:
            pixels = decode_image(sample.data, self._frozen.encoder.in_channels)
            return centre_crop(pixels, self._frozen.preprocessing.image_size, self._frozen.crop_pct)
        except DecodeError:
            return None

    def _embed(self, batch: _DecodedRows) -> pa.Table:
        features, _ = self._frozen.pool([batch])
        columns = [
            pa.array([row for row, _ in batch.samples], type=pa.int64()),
            pa.array([sample.path or None for _, sample in batch.samples], type=pa.string()),
            pa.array([sample.label if sample.label >= 0 else None for _, sample in batch.samples], type=pa.int64()),
            pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().reshape(-1)), self._frozen.width),
        ]
        return pa.Table.from_arrays(columns, schema=feature_schema(self._frozen.width))


class EmbeddingWorker:
    """An Embedder in the form that Ray Data's map_batches takes: built once in each process of a pool."""

    def __init__(self, load: Callable[[], FrozenEncoder], source: Source, num_processes: int) -> None:
        self._embed = Embedder(load(), source, num_processes)

    def __call__(self, block: Mapping[str, Any]) -> pa.Table:
        """The features of rows `start` to `stop`.   Args: block: both, in arrays of one value."""
        return self._embed(np.arange(block["start"][0], block["stop"][0]))


def feature_schema(width: int) -> pa.Schema:
    """The columns of a table of features."""
    kinds = {"row": pa.int64(), "path": pa.string(), "label": pa.int64(), "feature": pa.list_(pa.float32(), width)}
    return pa.schema(list(kinds.items()))
