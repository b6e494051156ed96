"""The sweep's own run in MLflow: opened before the trials, closed with what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ray import tune
from torch import nn

from mixmae.data.blocks import eval_batch
from mixmae.finetune.classification import Predictor
from mixmae.inference import load_classifier
from mixmae.jobs.config import to_json
from mixmae.jobs.job import PLAIN_NAMES, Job
from mixmae.jobs.record import read_record
from mixmae.jobs.segmentation import SegmentationJob
from mixmae.jobs.segmenter import load_segmenter
from mixmae.jobs.supervised import SupervisedJob
from mixmae.segmentation.predictor import PixelPredictor
from mixmae.segmentation.upernet import UPerNet
from mixmae.tracking import (
    NOTE_TAG,
    RunRef,
    end_later,
    finish_run,
    log_file,
    log_table,
    model_link,
    register_model,
    save_view,
    send_rest,
    tag_run,
)
from mixmae.training.run_folder import RunFolder, weights_of
from mixmae.writing import write_json
from pipelines.console import elapsed_since
from pipelines.run import Run
from pipelines.sweeping.results import (
    FROM_SCRATCH,
    Reference,
    TrialResult,
    draw_curves,
    draw_heat_map,
    link_line,
    print_table,
    rank,
    rows_of,
    scores,
    verdict,
    write_csv,
    write_note,
)
from pipelines.sweeping.trial import Sweep, curve, result_of, trial_folder
from pipelines.sweeping.tuner import TUNE_FOLDER
from tune_spaces.fields import set_fields
from tune_spaces.space import Space


def open_parent(run: Run, space: Space, job: Job) -> tuple[RunRef, dict[str, str]]:
    """The sweep's MLflow run; without the trials' numbers among its parameters, as it is no point of their plots.

    Returns: the run, and by their words the links of its description.
    """
    pretrained = run.record.pretrained
    ref = run.open({"space": run.record.recipe, **space.to_json()}, {**job.tags, "stage": "sweep"}, met=job.account)
    shown = [PLAIN_NAMES.get(field, field) for field in space.vary]
    metrics = [space.final_metric]
    if isinstance(job, SupervisedJob):
        metrics.append(space.final_metric.replace("final/", "best/"))
    title = f"trials of {run.name}"
    table, axes = save_view(ref, title, params=shown, metrics=metrics, descending=space.mode == "max")
    links = {"all trials, ranked": table, "parallel coordinates": axes}
    if pretrained and pretrained.run_id:
        theirs = tag_run(ref.uri, pretrained.run_id, f"swept.{ref.run_id}", run.name)
        links |= {"pretraining": theirs.link} if theirs else {}
    tag_run(ref.uri, ref.run_id, NOTE_TAG, f"Under way: {link_line(links)}")
    return ref, links


def conclude(run: Run, shared: Sweep, start: float, links: dict[str, str]) -> int:
    """Rank the trials, keep tables and pictures, print what is best, and close the run.

    Args: start: time.monotonic() before the trials.  links: of the description, as open_parent made them.
    Returns: the process's exit status: 0 if a trial finished and none failed.
    """
    space, folder, parent = shared.space, shared.folder, shared.run
    metric = space.final_metric
    # Not what fit() returns: that forgets the values of trials that never reported.
    trials = tune.ExperimentAnalysis(str(folder / TUNE_FOLDER)).trials
    ended = rank([result_of(shared, trial) for trial in trials], metric, space.mode)
    winner = ended[0] if ended[0].is_ranked else None
    num_failed = sum(result.status == "failed" for result in ended)
    complete = winner is not None and not num_failed

    reference = find_reference(shared, ended)
    remarks = verdict(ended, metric, reference, shared.job.num_judged) if winner else ""
    files = write_results(shared, ended, winner, reference)
    links |= {file.stem.replace("_", " "): parent.file_link(file.name) for file in files if file.suffix == ".png"}
    tags = {NOTE_TAG: write_note(ended, metric, parent, links, reference, remarks)}
    if winner is not None:
        tags |= {"best.trial": winner.trial, "best.run_id": winner.run_id}
        tags |= {f"best.{name.rpartition('.')[2]}": str(value) for name, value in winner.values.items()}
    numbers = dict(winner.metrics) if winner else {}
    left = publish(shared, ended, files, tags, numbers, complete)

    print_table(ended)
    print(f"{len(ended)} trials in {elapsed_since(start)}")
    if winner is not None:
        print(
            f"best        {winner.label}: {metric} {scores(ended, metric, reference)}\n"
            f"weights     {folder / 'best'}\n{remarks}"
        )
    print(
        f"results     {', '.join(str(file) for file in files)}\nMLflow UI   {parent.ui_command}\n"
        f"            then Model training > {run.arguments.experiment} > {run.name}"
    )
    if left is not None:
        print(f"note: {left}", flush=True)
    if complete and left is None and shared.arguments.register_model is not None:
        name = shared.arguments.register_model
        version = register(shared, ended[0].run_id, name)
        links[f"model {name}, version {version}"] = model_link(name, version)
        tag_run(parent.uri, parent.run_id, NOTE_TAG, write_note(ended, metric, parent, links, reference, remarks))
    if num_failed:
        print(f"{num_failed} trials failed. The same command tries them again.")
    elif winner is None:
        print("No trial finished: give more --hours or other values, and another --output.")
    if complete and left is None:
        run.write(status="finished", checkpoint=str(folder / "best"), metrics=numbers)
    return 0 if complete else 1


def publish(
    shared: Sweep,
    ended: Sequence[TrialResult],
    files: Sequence[Path],
    tags: Mapping[str, str],
    numbers: Mapping[str, float],
    complete: bool,
) -> str | None:
    """Give MLflow what it lacks of the trials, and the sweep's results, and end the sweep's run.

    Args: ended: ranked.
    Returns: None, or where MLflow is away a line on what to do.
    """
    parent = shared.run
    try:
        if left := send_rest(trial_folder(shared.folder, result.trial) for result in ended):
            return left
        for file in files:
            log_file(parent, file)
        for number, result in enumerate(ended, start=1):
            if result.is_ranked and result.run_id:
                tag_run(parent.uri, result.run_id, "rank", str(number))
        finish_run(parent, status="FINISHED" if complete else "FAILED", tags=tags, metrics=numbers)
        if complete:  # once and last: MLflow adds rows to a table that is there
            log_table(parent, rows_of(ended), "results")
    except Exception as error:  # the store's trouble must not hide the results
        reason = str(error).partition("\n")[0][:300]
        return f"MLflow has not got the results of the sweep ({reason}): the same command sends them once it answers."
    return None


def find_reference(shared: Sweep, ended: Sequence[TrialResult]) -> Reference | None:
    """What the best trial is compared with, if it is known: of a pretraining, its own encoder before the first step.

    Args: ended: ranked.
    """
    metric = shared.space.final_metric
    if shared.space.pretrains:
        start = [value for step, value in curve(shared, ended[0]) if step == 0]
        return Reference(words="untrained encoder", value=start[0]) if start else None
    done = [result for result in ended if result.is_reference and result.status == "finished"]
    return Reference(words=FROM_SCRATCH, value=done[0].metrics[metric]) if done else None


def write_results(
    shared: Sweep, ended: Sequence[TrialResult], winner: TrialResult | None, reference: Reference | None
) -> list[Path]:
    """Write the sweep's files: results.csv, the pictures, and of a winner best_config.json and the link best.

    Args: ended: ranked.
    Returns: the files, without the link.
    """
    space, folder = shared.space, shared.folder
    write_csv(rows_of(ended), folder / "results.csv")
    draw_curves(ended, {result.trial: curve(shared, result) for result in ended}, space.metric, folder / "curves.png")
    files = [folder / "results.csv", folder / "curves.png"]
    if space.search == "grid" and len(space.vary) == 2:
        draw_heat_map(ended, space.final_metric, folder / "heat_map.png", reference)
        files.append(folder / "heat_map.png")
    if winner is not None:
        config = set_fields(shared.arguments.config, dict(winner.values))
        write_json(folder / "best_config.json", to_json(config))
        files.append(folder / "best_config.json")
        link = folder / "best"  # makes the sweep's folder one that evaluate.py, predict.py and export.py take
        link.unlink(missing_ok=True)
        link.symlink_to(weights_of(trial_folder(folder, winner.trial)).relative_to(folder), target_is_directory=True)
    return files


def register(shared: Sweep, run_id: str, name: str) -> str:
    """Add the best weights of the winner's run to MLflow's registry.   Returns: the version."""
    assert isinstance(shared.job, SupervisedJob)
    best, metadata = shared.folder / "best", {"classes": list(shared.job.classes)}
    model: nn.Module
    if isinstance(shared.job, SegmentationJob):
        segmenter = load_segmenter(best, device="cpu")
        assert isinstance(segmenter.model, UPerNet)
        size, mean, std = segmenter.augment.size, segmenter.mean, segmenter.std
        model = PixelPredictor(segmenter.model, mean=mean, std=std)
    else:
        classifier = load_classifier(best, device="cpu")
        preprocessing = classifier.metadata.preprocessing
        size, mean, std = preprocessing.image_size, preprocessing.mean, preprocessing.std
        model = Predictor(classifier.model, mean=mean, std=std)
    example = eval_batch(shared.job.validation, range(2), size, channels=len(mean)).numpy()
    version = register_model(replace(shared.run, run_id=run_id), model.eval(), example, name, metadata)
    print(f"model       models:/{name}@best, version {version}")
    return version


def close_children(folder: Path) -> None:
    """Mark the trials under way as interrupted in MLflow, if it answers.   Args: folder: of the sweep."""
    stopped: list[Path] = []
    for path in sorted((folder / "trials").glob("*")):
        record = read_record(RunFolder(path))
        if record is not None and record.status == "running":
            end_later(path, record.mlflow, status="KILLED")
            stopped.append(path)
    send_rest(stopped)
