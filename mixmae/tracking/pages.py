"""What MLflow's pages show: saved views of a sweep's trials."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from mixmae.tracking.store import TRAINING_SIDE, RunRef, connect


def save_view(
    parent: RunRef, name: str, *, params: Sequence[str], metrics: Sequence[str], descending: bool
) -> tuple[str, str]:
    """Save a view of the runs below another one: ranked by the first metric, in these columns and no others.

    Returns: links to it as a table and as parallel coordinates; it is also in the menu Views of the experiment.
    Source: MLflow keeps views in tags of the experiment, in a format of its own: this is 3.17's.
    """
    chart = {
        **{"type": "PARALLEL", "uuid": "parallel", "metricSectionId": "runs", "runsCountToCompare": 1000},
        **{"selectedParams": list(params), "selectedMetrics": [metrics[0]], "showAllRuns": True},
        **{"deleted": False, "isGenerated": False},
    }
    section = {"uuid": "runs", "name": name, "display": True, "isReordered": True, "deleted": False}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent.run_id}'",
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": not descending,
        "selectedColumns": [f"params.`{key}`" for key in params] + [f"metrics.`{key}`" for key in metrics],
        "runsHiddenMode": "SHOW_ALL",  # or charts leave out all but ten
        "compareRunCharts": [chart],
        "compareRunSections": [section | {"isGenerated": False}],
        "isAccordionReordered": True,  # or the sections are sorted by name
    }
    view = {"name": name, "createdAt": int(time.time() * 1000), "state": json.dumps(state)}
    connect(parent.uri).set_experiment_tag(
        parent.experiment_id, f"mlflow.sharedViewState.{parent.run_id}", json.dumps(view)
    )
    link = f"#/experiments/{parent.experiment_id}/runs?{TRAINING_SIDE}&viewStateShareKey={parent.run_id}"
    return link, f"{link}&compareRunsMode=CHART"
