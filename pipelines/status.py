"""Tell how a run is, or was, from its folder alone: no Ray, no MLflow, from any machine that sees the folder.

    python pipelines/status.py OUTPUT [--verify] [--json]

Exit status: 0 finished; 1 stopped, failed, or it cannot be told; 2 the command line is wrong; 3 running; 4 interrupted
or killed, and the run's own command continues it; 5 there is no run.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import tyro

from mixmae.lock import is_running, read_owner
from mixmae.tracking import backlog, refused
from mixmae.training import store_lock
from mixmae.training.checkpoint_files import checkpoints_of, look_at
from mixmae.training.progress import RESTARTS_FILE, STARTS_FILE, read_lines, read_progress
from mixmae.training.run_store import RunStore
from pipelines.command import command

EXIT_STATUS = {"finished": 0, "stopped": 1, "failed": 1, "running": 3, "interrupted": 4, "no run": 5}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line."""

    output: tyro.conf.Positional[Path]
    """Folder of a run or of a sweep, local or in a store: what its --output was."""
    verify: bool = False
    """Read the whole of the newest checkpoint and compare it with its digests, not the lengths of its files alone."""
    json: bool = False
    """Print one JSON object with the same content."""


def report(place: Path, *, verify: bool = False) -> dict[str, Any]:
    """All that a run's folder tells, as JSON values.

    Args: place: the folder, local or in a store.  verify: read the bytes of the newest checkpoint.
    Raises: ValueError for a damaged run.json or lock; OSError if the folder cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="mixmae-status-") as copy:
        store = RunStore.of(place, Path(copy))
        if store is None:
            return _report(place.resolve(), None, verify=verify)
        store.bring_records()
        return _report(store.local, store, verify=verify)


def _report(folder: Path, store: RunStore | None, *, verify: bool) -> dict[str, Any]:
    """What report returns.   Args: store: that the folder is a copy of."""
    shown = str(folder) if store is None else store.shown
    record, owner = _record(folder), read_owner(folder) if folder.is_dir() else None
    lives = owner is not None and (is_running(folder, owner) if store is None else store_lock.is_running(store, owner))
    state = _state(record, lives)
    found: dict[str, Any] = {"output": shown, "state": state, "exit_status": EXIT_STATUS[state]}
    if state == "no run":
        return found
    record = record or {}
    progress = read_progress(folder)
    found |= {
        "recipe": record.get("recipe"),
        "data": (record.get("data") or {}).get("name"),
        "reason": record.get("reason", ""),
        "owner": None if owner is None else {**asdict(owner), "lives": lives, "age_s": round(owner.age_s, 1)},
        "progress": progress,
        "restarts": read_lines(folder / RESTARTS_FILE),
        "starts": read_lines(folder / STARTS_FILE),
        "broken_images": _broken(folder, record, progress),
        "mlflow": {
            **(record.get("mlflow") or {}),
            "backlog": backlog(folder),
            "refused": refused(folder),
            "left": {path.name: backlog(path) for path in sorted(folder.glob("left_*_at_step_*"))},
        },
        "disk": None if store else {"free_bytes": shutil.disk_usage(folder).free},
    }
    if "space" in record:
        found["trials"] = [_trial(path, lives) for path in sorted((folder / "trials").glob("*"))]
        return found
    looked = []
    for path in checkpoints_of(folder) if store is None else map(Path, store.checkpoints()):
        looked.append(look_at(path, verify=verify) if store is None else store.look_at(path.name, verify=verify))
        if not looked[-1].problem:
            break
    found["checkpoints"] = [{**asdict(item), "path": str(item.path)} for item in looked]
    return found


def _record(folder: Path) -> dict[str, Any] | None:
    file = folder / "run.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): put it back from a copy.") from error


def _state(record: Mapping[str, Any] | None, lives: bool) -> str:
    """A run's state.   Args: lives: whether somebody has the lock who lives."""
    status = None if record is None else record.get("status")
    if status == "finished" or lives:
        return "finished" if status == "finished" else "running"
    if status is None:
        return "no run"
    return status if status in ("stopped", "failed") else "interrupted"


def _trial(folder: Path, lives: bool) -> dict[str, Any]:
    """What a line about a trial needs.   Args: lives: whether the sweep goes on."""
    record = _record(folder) or {}
    is_under_way = lives and record.get("status") == "running"
    return {
        "trial": folder.name,
        "state": _state(record, is_under_way),
        "reason": record.get("reason", ""),
        "values": record.get("trial"),
        "progress": read_progress(folder),
        "metrics": {name: value for name, value in record.get("metrics", {}).items() if name.startswith("final/")},
    }


def _broken(folder: Path, record: Mapping[str, Any], progress: Mapping[str, Any] | None) -> dict[str, Any]:
    """How many images could not be used, of how many, and how many may."""
    loop = record.get("config", {}).get("loop", {})
    seen = int((progress or {}).get("step", 0)) * int(loop.get("batch_size", 0))
    named = len(read_lines(folder / "broken_images.jsonl"))
    replaced = int((progress or {}).get("broken_images", named))
    return {"named": named, "replaced": replaced, "seen": seen, "limit": loop.get("max_broken_fraction")}


def show(found: Mapping[str, Any]) -> str:
    """A report in words."""
    state, lines = found["state"], [f"output      {found['output']}"]
    if state == "no run":
        return f"{lines[0]}\nstate       no run there: check the path, or start one with --output {found['output']}"
    reason = f": {found['reason']}" if found["reason"] else ""
    again = "; the same command continues" if state == "interrupted" else ""
    lines.append(f"state       {state}{reason}{again}")
    data = f" on {found['data']}" if found["data"] else ""
    lines.append(f"run         {found['recipe'] or 'not recorded yet'}{data}")
    if owner := found["owner"]:
        lines.append(f"owner       {_owner(owner)}")
    if progress := found["progress"]:
        lines += _progress(progress, is_running=state == "running")
    for checkpoint in found.get("checkpoints", []):
        lines.append(f"checkpoint  {_checkpoint(checkpoint)}")
    if found.get("checkpoints") == []:
        lines.append("checkpoint  none yet")
    if starts := found["starts"]:
        lines.append(f"workers     {_workers(starts)}")
    restarts = found["restarts"]
    lines.append(f"restarts    {len(restarts)}")
    for item in restarts[-3:]:
        lines.append(f"            {_clock(item['time'])}, from step {item['step']}: {item['reason']}")
    lines.append(f"data        {_data(found['broken_images'])}")
    mlflow = found["mlflow"]
    where = f"{mlflow['uri']}, run {mlflow['run_id']}" if "run_id" in mlflow else "no run yet"
    lines.append(f"MLflow      {mlflow['backlog']} points are not sent yet; {where}")
    if mlflow["refused"]:
        lines.append(f"            {_refused(mlflow['refused'])}")
    for name, count in mlflow["left"].items():
        lines.append(f"            {name}: {count} points are not sent yet")
    if found["disk"]:
        lines.append(f"disk        {_disk(found)}")
    for trial in found.get("trials", []):
        lines.append(f"trial       {_show_trial(trial)}")
    return "\n".join(lines)


def _owner(owner: Mapping[str, Any]) -> str:
    job = f", Ray job {owner['job']}" if owner["job"] else ""
    who = f"{owner['user']} on {owner['host']} (process {owner['pid']}{job})"
    since = f"since {_clock(owner['started'])} (start {owner['generation']} of this run)"
    if owner["lives"]:
        return f"{who}, heartbeat {owner['age_s']:.0f} s ago, {since}"
    if owner["released"].startswith("-"):
        return f"none; {who} died, its last heartbeat was at {_clock(owner['heartbeat'])}, {since}"
    return f"none; {who} ended at {_clock(owner['released'])}, {since}"


def _progress(progress: Mapping[str, Any], *, is_running: bool) -> list[str]:
    step, total = progress["step"], progress["total_steps"]
    words = {"epoch": "epoch {:.2f}", "loss": "loss {:.4f}", "images_per_s": "{:.0f} images/s"}
    words |= {"data_wait_share": "waiting for data {:.0%}"}
    said = [f"{step} of {total} ({step / total:.0%})"]
    said += [text.format(progress[name]) for name, text in words.items() if name in progress]
    lines = [f"step        {', '.join(said)}, at {_clock(progress['time'])}"]
    if is_running and progress["eta_s"] is not None:
        left = max(0.0, progress["time"] + progress["eta_s"] - time.time())
        lines.append(f"ETA         {timedelta(seconds=round(left))}, at {_clock(time.time() + left)}")
    return lines


def _checkpoint(found: Mapping[str, Any]) -> str:
    what = f"{Path(found['path']).name}, {_size(found['num_bytes'])}"
    if found["problem"]:
        return f"{what}: DAMAGED, {found['problem']}"
    if found["checked"] == "bytes":
        return f"{what}: verified, all bytes are those that were written"
    if found["checked"] == "names":
        return f"{what}: all files are there (--verify reads the bytes)"
    if found["has_digests"]:
        return f"{what}: all files have their lengths (--verify reads the bytes)"
    return f"{what}: all files have their lengths; not verifiable, an earlier version wrote it without digests"


def _workers(starts: Sequence[Mapping[str, Any]]) -> str:
    """How many workers there are, and were at the starts before."""
    *before, last = starts
    then = ", ".join(f"{item['workers']} from step {item['step']}" for item in before[-3:])
    which = f"; at the {'last ' if len(before) > 3 else ''}starts before {then}" if before else ""
    return f"{last['workers']} from step {last['step']}, since {_clock(last['time'])}{which}"


def _data(broken: Mapping[str, Any]) -> str:
    limit = "" if broken["limit"] is None else f", {broken['limit']:.1%} may be"
    share = f" of {broken['seen']} seen ({broken['replaced'] / broken['seen']:.2%}{limit})" if broken["seen"] else ""
    return f"{broken['replaced']} broken images replaced{share}; {broken['named']} in broken_images.jsonl"


def _refused(entries: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({str(name) for entry in entries for name in (entry.get("metrics") or [_name(entry)])})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    why = f"{', '.join(names[:3])}{more}; the last: {entries[-1]['reason']}"
    return f"{len(entries)} entries were refused ({why}) and are kept in metrics.refused.jsonl"


def _name(entry: Mapping[str, Any]) -> Any:
    return entry.get("image") or entry.get("file") or "the end of the run"


def _disk(found: Mapping[str, Any]) -> str:
    free, sizes = found["disk"]["free_bytes"], [item["num_bytes"] for item in found.get("checkpoints", [])]
    if not sizes or not max(sizes):
        return f"{_size(free)} free"
    room = free // max(sizes)
    if room == 0:
        return f"{_size(free)} free: NO ROOM for the next checkpoint of {_size(max(sizes))}: make some"
    return f"{_size(free)} free: room for {room} more checkpoints"


def _show_trial(trial: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in (trial["values"] or {}).items())
    said = [f"{trial['trial']} ({values}) {trial['state']}"]
    if progress := trial["progress"]:
        said.append(f"step {progress['step']} of {progress['total_steps']}")
    said += [f"{name.removeprefix('final/')} {value:.4f}" for name, value in trial["metrics"].items()]
    return ", ".join([*said, *([trial["reason"]] if trial["reason"] else [])])


def _clock(moment: float | str) -> str:
    when = datetime.fromisoformat(moment) if isinstance(moment, str) else datetime.fromtimestamp(moment).astimezone()
    return when.astimezone().strftime("%d %B %H:%M:%S")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def run(arguments: Arguments) -> int:
    """Print the report.   Returns: the process's exit status, as the docstring above has them."""
    found = report(arguments.output, verify=arguments.verify)
    print(json.dumps(found, indent=2) if arguments.json else show(found))
    return int(found["exit_status"])


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return command(run, Arguments, argv, program="status.py", about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
