"""Images per second that one core reads, decodes and transforms for segmentation and detection, with their truth.

    python benchmarks/dense_decoding.py [--images 128]

The images are scikit-learn's two photographs (640 x 427 px, 143 and 197 KB, as COCO's are on average), under eight
ellipses each. Seconds are those of the process's CPU time, which other programs on the machine hardly change.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from mixmae.data.prepare import open_for_training
from mixmae.jobs.estimate import decode_rate
from pipelines.recipes import DETECT_RECIPES, SEGMENT_RECIPES

NUM_OBJECTS, POINTS = 8, 48


def write_sets(folder: Path, num_images: int) -> tuple[Path, Path]:
    """A set with maps of classes, and one in COCO's layout.   Returns: their folders."""
    rng = np.random.default_rng(0)
    maps, coco = folder / "maps", folder / "coco"
    for path in (maps / "images", maps / "masks", coco / "images"):
        path.mkdir(parents=True)
    (maps / "classes.txt").write_text("\n".join(f"class {index}" for index in range(150)), encoding="utf-8")
    photos = [Path(name) for name in load_sample_images().filenames]
    images, annotations = [], []
    for number in range(num_images):
        content = photos[number % 2].read_bytes()
        width, height = Image.open(photos[number % 2]).size
        for path in (maps, coco):
            (path / "images" / f"{number:04}.jpg").write_bytes(content)
        images.append({"id": number, "file_name": f"{number:04}.jpg", "width": width, "height": height})
        picture = Image.new("L", (width, height), int(rng.integers(150)))
        for _ in range(NUM_OBJECTS):
            axes = rng.uniform(0.05, 0.2, 2) * (width, height)
            centre = axes + rng.random(2) * ((width, height) - 2 * axes)
            angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
            points = centre + axes * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            ImageDraw.Draw(picture).polygon([tuple(point) for point in points.tolist()], fill=int(rng.integers(150)))
            box = [*(centre - axes).tolist(), *(2 * axes).tolist()]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": int(rng.integers(1, 81)), "bbox": box,
                 "segmentation": [points.ravel().tolist()], "area": float(np.pi * axes.prod()), "iscrowd": 0}
            )  # fmt: skip
        picture.save(maps / "masks" / f"{number:04}.png")
    categories = [{"id": index, "name": f"class {index}"} for index in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (coco / "annotations.json").write_text(json.dumps(content), encoding="utf-8")
    return maps, coco


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sets = write_sets(Path(folder), arguments.images)
        names = ("mixmae_swin_base_ade20k_160k", "mixmae_swin_base_coco_55ep")
        for name, place in zip(names, sets, strict=True):
            config = {**SEGMENT_RECIPES, **DETECT_RECIPES}[name]()
            source, _ = open_for_training(str(place), Path(folder) / "shards", 0)
            print(f"{name}: {decode_rate(config, source):.1f} images/s per core", flush=True)


if __name__ == "__main__":
    main()
