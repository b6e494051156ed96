"""The account of what was met, from the readers to stats, the manifest and a run's line."""

from __future__ import annotations

import json

from mixmae.data.account import Account, Met, Note, account
from mixmae.data.shards.pack import make_shards
from mixmae.data.sources import list_splits, open_source, open_train_and_held_out
from pipelines.stats import stats


def test_splits_that_share_a_place_are_counted_once(write_files):
    folder = write_files(*(f"{split}/{name}/{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(10)))
    (folder / "x.jxl").write_bytes(b"x")
    met = account({split: open_source(folder, split) for split in list_splits(folder)})
    assert met.images == met.labelled == {"train": 20, "validation": 20}
    assert (met.num_classes, met.looked_at) == (2, {"image files": 40})
    assert [(note.what, note.count) for note in met.notes] == [("files ending in .jxl are left out", 1)]
    assert met.line == ("20 train, 20 validation images; 2 classes; files ending in .jxl are left out: 1 (x.jxl)")


def test_rows_that_are_held_out_are_of_the_same_place(write_files):
    train, held_out = open_train_and_held_out(write_files(*(f"{i}.jpg" for i in range(30))))
    met = account({"training": train, "held-out": held_out})
    assert met.images == {"training": 27, "held-out": 3}
    assert met.looked_at == {"image files": 30}
    assert met.line == "27 training, 3 held-out images; no classes of whole images"


def test_shards_remember_what_they_were_made_of(write_files, tmp_path):
    folder = write_files(*(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(20)), "preview.jpg")
    (folder / "IMG.CR2").write_bytes(b"x")
    lines: list[str] = []
    made = make_shards(folder, tmp_path / "out", report=lines.append)
    said = [line for line in lines if line.startswith("note: ") and "jpegtran" not in line]
    assert len(said) == 2
    assert "IMG.CR2" in said[0]
    assert "preview.jpg" in said[1]
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert [note["count"] for note in manifest["met"]["notes"]] == [1, 1]
    met = account({split: open_source(made.folder, split) for split in list_splits(made.folder)})
    assert met.looked_at["image files"] == 41
    assert {note.example for note in met.notes} == {"IMG.CR2", "preview.jpg"}
    content = stats(str(folder), tmp_path / "stats", report=lines.append)
    assert content["met"]["notes"] == manifest["met"]["notes"]
    assert "looked at 41 image files" in lines


def test_the_line_names_the_most_frequent():
    notes = [Note(f"things of kind {kind}", kind, f"x{kind}", "mend them") for kind in range(1, 6)]
    met = Account(images={"train": 9}, labelled={"train": 7}, num_classes=1, looked_at={}, notes=notes)
    assert met.line == (
        "9 train images; 1 class, 2 images without one; things of kind 5: 5 (x5); things of kind 4: 4 (x4); "
        "things of kind 3: 3 (x3); and 2 kinds more"
    )
    assert Met.from_json("p", json.loads(json.dumps(met.as_json()))) == Met("p", {}, tuple(notes))
