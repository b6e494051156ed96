"""Folders of images with a mask for each: which mask belongs to which image, and what its values mean.

Four layouts are recognised: ADE20K (SceneParse150: images/training/x.jpg, annotations/training/x.png), Cityscapes
(leftImg8bit/train/CITY/x_leftImg8bit.png, gtFine/train/CITY/x_gtFine_labelIds.png), Pascal VOC (JPEGImages,
SegmentationClass, ImageSets/Segmentation), and images/ beside masks/ (or annotations/ or labels/), with split folders
above or inside. Masks are PNGs of one channel, or with a palette, whose values are read as they are.

What the values mean is settled before anything is trained: by a file masks.json in the folder, else by the layout, else
by classes.txt, a name per line from value 0 on, else by the values themselves. Sets in Pascal VOC's form may have
classes of their own, so there classes.txt comes before the layout. 255 is ignored where nothing else is said.
    {"classes": ["road", "car"], "values": [1, 2], "ignore": [0, 255]}
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mixmae.data.account import Met, Note, Tally, escaped
from mixmae.data.chunks import Int64Array
from mixmae.data.images.decode import DecodeError, Uint8Array
from mixmae.data.source import DataError, short_digest
from mixmae.data.sources.contents import content_digests
from mixmae.data.sources.folders import FilesSource, ImageFile, open_files
from mixmae.data.sources.image_sets import read_image_sets
from mixmae.data.sources.splits import split_of_folder
from mixmae.data.sources.storage import Storage, StoredFile, suffix_of
from mixmae.data.truth import IGNORE, MAX_CLASSES, DenseClasses, Truth, encode_map
from mixmae.machine import usable_cores

RULE_FILE = "masks.json"
NAME_FILES = ("classes.txt", "classnames.txt", "class_names.txt")
"""Names of classes, one per line; the last one is that of labelme2voc."""
_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_EXAMPLE = '{"classes": ["road", "car"], "values": [1, 2], "ignore": [0, 255]}'
LOOKED_AT = 200
"""Masks that are looked at when a set is opened, spread over each split."""

CITYSCAPES = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
    **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
    **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
}
"""The classes that Cityscapes is evaluated on, and their values in files called labelIds."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """What the values of masks mean."""

    classes: tuple[str, ...]
    """Names."""
    values: tuple[int, ...]
    """The value of each class."""
    ignore: tuple[int, ...] = (IGNORE,)
    """Values of pixels that no class is asked of."""

    def __post_init__(self) -> None:
        every = (*self.values, *self.ignore)
        if len(self.values) != len(self.classes) or len(set(every)) < len(every) or min(every) < 0 or max(every) > 255:
            raise DataError(
                f"a rule of masks has {len(self.classes)} classes, the values {list(self.values)} and ignores "
                f"{list(self.ignore)}: give each class one value from 0 to 255 that nothing else has"
            )

    @cached_property
    def table(self) -> NDArray[np.int16]:
        """(256,) int16: class of each value, IGNORE, or -1 where it means nothing."""
        table = np.full(256, -1, dtype=np.int16)
        table[list(self.ignore)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def apply(self, values: Uint8Array) -> Uint8Array:
        """The class indices of a mask (H, W).   Raises: DecodeError if a value means nothing."""
        indices = self.table[values]
        if (indices < 0).any():
            wrong = np.unique(values[indices < 0]).tolist()
            raise DecodeError(
                f"its mask has the value{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong[:5]))}, which "
                f"{'are no classes and are' if len(wrong) > 1 else 'is no class and is'} not ignored"
            )
        return indices.astype(np.uint8)


@dataclass(frozen=True)
class _Layout:
    """How the names of images and masks belong together."""

    title: str
    image: str
    """A regular expression over relative paths; images and masks of the same `key` and `pre` belong together."""
    mask: str
    name: Callable[[Sequence[str]], bool] = lambda names: True
    """Whether the relative paths of the images look like this set's."""


_SUFFIX = r"\.[^./]+"
_LAYOUTS = (
    _Layout(
        "Cityscapes",
        rf"(?P<pre>(?:.*/)?)leftImg8bit/(?P<key>.+)_leftImg8bit{_SUFFIX}",
        r"(?P<pre>(?:.*/)?)gtFine/(?P<key>.+)_gtFine_(?P<kind>labelIds|labelTrainIds)\.png",
    ),
    _Layout(
        "Pascal VOC",
        rf"(?P<pre>(?:.*/)?)JPEGImages/(?P<key>[^/]+){_SUFFIX}",
        r"(?P<pre>(?:.*/)?)SegmentationClass/(?P<key>[^/]+)\.png",
    ),
    _Layout(
        "ADE20K",
        rf"(?P<pre>(?:.*/)?)images/(?P<key>(?:training|validation)/ADE_[^/]+){_SUFFIX}",
        r"(?P<pre>(?:.*/)?)annotations/(?P<key>(?:training|validation)/ADE_[^/]+)\.png",
    ),
    _Layout(
        "images and masks",
        rf"(?P<pre>(?:.*/)?)images/(?P<key>.+){_SUFFIX}",
        rf"(?P<pre>(?:.*/)?)(?:masks|annotations|labels)/(?P<key>.+?)(?:_mask)?{_SUFFIX}",
    ),
)


@dataclass(frozen=True)
class MaskedFile:
    """An image and its mask."""

    image: StoredFile
    mask: StoredFile


@dataclass(frozen=True, kw_only=True)
class MaskListing:
    """Images with masks, by split."""

    layout: str
    splits: dict[str, list[MaskedFile]]
    rule: MaskRule | None
    """None: the values themselves have to tell."""
    notes: tuple[Note, ...]


def list_masks(storage: Storage, root: str, files: Sequence[StoredFile]) -> MaskListing | None:
    """Find the pairs of images and masks in a folder; None if it has none.

    Args: files: all image files below the root.
    Raises: DataError for masks that are recognised but cannot be used.
    """
    if not storage.is_local:
        return None
    _refuse_full_ade(files)
    for layout in _LAYOUTS:
        found = [(file, match) for file in files if (match := re.fullmatch(layout.mask, file.relative))]
        kind = _one_kind(match.groupdict().get("kind") for _, match in found)
        masks = {_key(match): (file, match) for file, match in found if match.groupdict().get("kind") == kind}
        images = {_key(match): file for file in files if (match := re.fullmatch(layout.image, file.relative))}
        pairs = {key: MaskedFile(images[key], masks[key][0]) for key in images if key in masks}
        if not pairs:
            continue
        jpegs = [pair.mask.relative for pair in pairs.values() if suffix_of(pair.mask.path) in _JPEG]
        if jpegs:
            raise DataError(
                f"{len(jpegs)} masks of {storage.shown(root)} are JPEGs, such as {escaped(jpegs[0])}, and a JPEG's "
                "pixels do not keep their values: save masks as PNG."
            )
        tally = Tally()
        splits = _split(storage, root, layout, pairs, images.keys(), tally)
        for key in sorted(images.keys() - masks.keys()):
            what = "images have no mask and are left out"
            tally.add(what, images[key].relative, "add their masks, with all pixels ignored if need be")
        for key in sorted(masks.keys() - images.keys()):
            tally.add("masks have no image and are left out", masks[key][0].relative)
        listed = {pair.image.relative for part in splits.values() for pair in part}
        unlisted = [pair.image.relative for pair in pairs.values() if pair.image.relative not in listed]
        if unlisted:
            tally.add("images are in no list of ImageSets and are left out", unlisted[0], count=len(unlisted))
        rule = rule_of_folder(storage, root, layout.title, kind)
        return MaskListing(layout=layout.title, splits=splits, rule=rule, notes=tally.notes)
    return None


def _one_kind(kinds: Iterable[str | None]) -> str | None:
    """The kind that most masks have, labelIds of two as frequent: an image may have masks of both."""
    counts = Counter(kinds)
    return max(sorted(counts, key=str), key=lambda kind: counts[kind], default=None)


def _key(match: re.Match[str]) -> str:
    return match["pre"] + match["key"]


def _refuse_full_ade(files: Sequence[StoredFile]) -> None:
    full = [file.relative for file in files if re.search(r"ADE_(train|val|frame)_[^/]*_seg\.png$", file.relative)]
    if full:
        raise DataError(
            f"{escaped(full[0])} is of the full ADE20K, whose masks hold thousands of classes in colours: segmentation "
            "is done on SceneParse150, ADEChallengeData2016.zip, with the folders images and annotations."
        )


def _split(
    storage: Storage,
    root: str,
    layout: _Layout,
    pairs: dict[str, MaskedFile],
    images: Collection[str],
    tally: Tally,
) -> dict[str, list[MaskedFile]]:
    """The pairs by split: by the folders' names, in Pascal VOC by its lists.   Args: images: keys, masked or not."""
    splits: dict[str, list[MaskedFile]] = {}
    if layout.title == "Pascal VOC":
        folder = next(iter(pairs.values())).image.relative.rpartition("JPEGImages/")[0]
        usable, known = (
            {key.removeprefix(folder) for key in keys if key.startswith(folder)} for keys in (pairs, images)
        )
        sets = read_image_sets(storage, f"{root}/{folder}ImageSets/Segmentation", usable, known, tally)
        if sets:
            return {split: [pairs[folder + stem] for stem in stems] for split, stems in sets.items()}
    for key in sorted(pairs):
        named = filter(None, map(split_of_folder, pairs[key].image.relative.split("/")[:-1]))
        splits.setdefault(next(named, "train"), []).append(pairs[key])
    return splits


def rule_of_folder(storage: Storage, root: str, layout: str, kind: str | None = None) -> MaskRule | None:
    """What the masks' values mean, by a file or by the layout; None if neither says.

    Args: layout: title of one, or another word.  kind: of Cityscapes' masks, labelIds or labelTrainIds.
    Raises: DataError for files that do not say it.
    """
    try:
        content = json.loads(storage.read_file(f"{root}/{RULE_FILE}"))
    except OSError:
        content = None
    except ValueError as error:
        raise DataError(f"{storage.shown(root)}/{RULE_FILE} is not JSON ({error}): write {_EXAMPLE}") from error
    if content is not None:
        try:
            classes = tuple(map(str, content["classes"]))
            values = tuple(map(int, content.get("values", range(len(classes)))))
            return MaskRule(classes=classes, values=values, ignore=tuple(map(int, content.get("ignore", [IGNORE]))))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DataError):
                raise DataError(f"{storage.shown(root)}/{RULE_FILE}: {error}") from error
            raise DataError(
                f"{storage.shown(root)}/{RULE_FILE} does not say what values mean ({error!r}): write {_EXAMPLE}"
            ) from error
    if layout == "Cityscapes":
        if kind == "labelIds":
            others = tuple(sorted({*range(34), IGNORE} - set(CITYSCAPES.values())))
            return MaskRule(classes=tuple(CITYSCAPES), values=tuple(CITYSCAPES.values()), ignore=others)
        return MaskRule(classes=tuple(CITYSCAPES), values=tuple(range(len(CITYSCAPES))))
    if layout == "ADE20K":
        names = _ade_names(storage, root)
        return MaskRule(classes=names, values=tuple(range(1, 151)), ignore=(0, IGNORE))
    for name in NAME_FILES:
        try:
            lines = storage.read_file(f"{root}/{name}").decode("utf-8-sig", "surrogateescape").splitlines()
        except OSError:
            continue
        classes = tuple(escaped(line.strip()) for line in lines if line.strip())
        return MaskRule(classes=classes, values=tuple(range(len(classes))))
    if layout == "Pascal VOC":
        return MaskRule(classes=VOC, values=tuple(range(len(VOC))))
    return None


def _ade_names(storage: Storage, root: str) -> tuple[str, ...]:
    """The names in objectInfo150.txt, if it is there: their first words; else the numbers."""
    try:
        lines = storage.read_file(f"{root}/objectInfo150.txt").decode(errors="replace").splitlines()[1:]
        names = tuple(line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip())
    except OSError:
        names = ()
    if len(names) != 150:
        return tuple(f"class {number}" for number in range(1, 151))
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} {number}" for number, name in enumerate(names, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedFiles(FilesSource):
    """Image files with a mask for each."""

    masks: tuple[StoredFile, ...]
    rule: MaskRule
    dense: DenseClasses

    @property
    def digest(self) -> str:
        masks = content_digests(self.storage, f"{self.root} masks", self.masks)
        return short_digest("\n".join([super().digest, *masks, repr(self.rule)]))

    def read_truth(self, chunk: int, rows_in_chunk: Sequence[int] | Int64Array) -> list[Truth]:
        """The class-index maps of rows of one chunk."""
        first = int(self.chunks.starts[chunk])
        rows = [first + int(row) for row in rows_in_chunk]
        truths = []
        for row, content in zip(rows, self.storage.read_files([self.masks[row].path for row in rows]), strict=True):
            try:
                indices = self.rule.apply(read_values(content))
            except DecodeError as error:
                truths.append(Truth(image_id=row, problem=f"{error} ({escaped(self.masks[row].relative)})"))
            else:
                truths.append(Truth(segmentation=encode_map(indices), image_id=row, size=indices.shape))
        return truths


def open_masked(
    storage: Storage, root: str, name: str, split: str, listing: MaskListing, met: Sequence[Any] = ()
) -> MaskedFiles:
    """Images with masks as a source.   Raises: DataError if hardly any of its masks can be used."""
    pairs = listing.splits[split]
    rule = listing.rule or _rule_of_masks(
        storage, tuple(pair.mask for part in listing.splits.values() for pair in part), storage.shown(root)
    )
    base = open_files(storage, root, name, [ImageFile(pair.image, -1) for pair in pairs], None, met)
    values = {field.name: getattr(base, field.name) for field in fields(base)}
    source = MaskedFiles(
        **values,
        masks=tuple(pair.mask for pair in pairs),
        rule=rule,
        dense=DenseClasses(pixels=rule.classes),
    )
    if _look_at(source, storage.shown(root), only_ignored=split == "test"):
        return source
    tally = Tally()
    what = "images of the test split have masks whose pixels are all ignored, as where the truth is not public"
    tally.add(what, pairs[0].mask.relative, "there is nothing to judge predictions by", count=len(pairs))
    return replace(source, met=(*source.met, Met(f"{storage.shown(root)} test masks", {}, tally.notes)))


def read_values(content: bytes | OSError) -> Uint8Array:
    """The values (H, W) uint8 of a mask file, as they are stored.   Raises: DecodeError with a one-line reason."""
    if isinstance(content, OSError):
        raise DecodeError(f"its mask cannot be read: {content.strerror or content}")
    if content[:2] == b"\xff\xd8":
        raise DecodeError("its mask is a JPEG, whose pixels do not keep their values: save masks as PNG")
    if not content:
        raise DecodeError("its mask is an empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            values = np.array(image)
    except UnidentifiedImageError as error:  # whose message has an address in memory
        raise DecodeError("its mask is not an image") from error
    except Exception as error:  # codecs raise whatever they like on damaged bytes
        raise DecodeError(f"its mask does not decode: {error}") from error
    if mode == "1":
        return values.astype(np.uint8)
    if mode in ("L", "P"):
        return values
    if mode.startswith("I") and values.ndim == 2 and values.min() >= 0 and values.max() <= 255:
        return values.astype(np.uint8)
    if mode.startswith("I"):
        raise DecodeError(f"its mask has values from {values.min()} to {values.max()}, and 0 to 255 can be read")
    if mode in ("RGB", "RGBA") and (values[..., :1] == values[..., :3]).all():
        return np.ascontiguousarray(values[..., 0])
    raise DecodeError(f"its mask has colours (mode {mode}) instead of one value for each pixel: save class indices")


def _rule_of_masks(storage: Storage, masks: Sequence[StoredFile], shown: str) -> MaskRule:
    """The rule where nobody says.   Raises: DataError."""
    print(
        f"note: reading {len(masks)} masks of {shown} once, to know their classes; classes.txt would say them",
        flush=True,
    )
    seen = _values_of(storage, tuple(masks))
    if not seen:
        (content,) = storage.read_files([masks[0].path])
        try:
            read_values(content)
        except DecodeError as error:
            first = escaped(masks[0].relative)
            raise DataError(
                f"none of the {len(masks)} masks of {shown} can be used, for example {first}: {error}"
            ) from error
    return rule_of_values(seen, shown)


def rule_of_values(seen: tuple[int, ...], shown: str) -> MaskRule:
    """The rule that values tell: 0 to the largest are classes, 255 is ignored.

    Args: seen: all values that occur, in order.  shown: names the set.   Raises: DataError.
    """
    classes = [value for value in seen if value != IGNORE]
    if not classes:
        raise DataError(f"no mask of {shown} has a value below 255: say what values mean in {RULE_FILE}: {_EXAMPLE}")
    if seen == (0, IGNORE):
        raise DataError(
            f"the masks of {shown} have the values 0 and 255 alone, and 255 usually means pixels to ignore. Say which "
            f'is meant, in {RULE_FILE}: {{"classes": ["ground", "object"], "values": [0, 255], "ignore": []}}'
        )
    if max(classes) >= MAX_CLASSES or len(classes) < (max(classes) + 1) / 4:
        raise DataError(
            f"the masks of {shown} have {len(classes)} values up to {max(classes)} ({', '.join(map(str, classes[:6]))}"
            f"{', ...' if len(classes) > 6 else ''}): say which are classes in {RULE_FILE}: {_EXAMPLE}"
        )
    count = max(classes) + 1
    return MaskRule(classes=tuple(map(str, range(count))), values=tuple(range(count)))


@lru_cache(maxsize=4)
def _values_of(storage: Storage, masks: tuple[StoredFile, ...]) -> tuple[int, ...]:
    """All values that occur in masks; those that cannot be read are left to be found later."""

    def one(mask: StoredFile) -> NDArray[np.bool_]:
        (content,) = storage.read_files([mask.path])
        try:
            return np.bincount(read_values(content).ravel(), minlength=256) > 0
        except DecodeError:
            return np.zeros(256, dtype=np.bool_)

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = np.zeros(256, dtype=np.bool_)
        for seen in pool.map(one, masks):
            found |= seen
    return tuple(np.flatnonzero(found).tolist())


def _look_at(source: MaskedFiles, shown: str, *, only_ignored: bool) -> bool:
    """Whether a look at some masks finds pixels that count.   Args: only_ignored: whether there may be none."""
    rows = np.unique(np.linspace(0, source.num_rows - 1, min(LOOKED_AT, source.num_rows)).astype(np.int64))
    masks = [source.masks[row] for row in rows.tolist()]
    contents = ((mask.relative, source.storage.read_files([mask.path])[0]) for mask in masks)
    return refuse_hopeless(source.rule, contents, shown, only_ignored=only_ignored)


def refuse_hopeless(
    rule: MaskRule, masks: Iterable[tuple[str, bytes | OSError]], shown: str, *, only_ignored: bool = False
) -> bool:
    """Look at some masks, and refuse a set most of whose masks cannot be used: another rule must be meant.

    Args:    masks: names and contents.  shown: names the set.  only_ignored: whether all pixels may be ignored.
    Returns: whether any pixel counts.   Raises: DataError.
    """
    problems, counted, count = [], 0, 0
    for name, content in masks:
        count += 1
        try:
            counted += int((rule.apply(read_values(content)) != IGNORE).sum())
        except DecodeError as error:
            problems.append(f"{escaped(name)}: {error}")
    if 2 * len(problems) > count:
        raise DataError(
            f"{len(problems)} of {count} masks of {shown} that were looked at cannot be used, for example "
            f"{problems[0]}; {len(rule.classes)} classes are expected: correct the masks, or say what their "
            f"values mean in {RULE_FILE}: {_EXAMPLE}"
        )
    if not counted and not only_ignored:
        raise DataError(
            f"all pixels of the {count} masks of {shown} that were looked at are ignored: say what their values "
            f"mean in {RULE_FILE}: {_EXAMPLE}"
        )
    return counted > 0
