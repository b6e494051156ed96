"""MLflow's registry of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixmae.tracking.store import TRAINING_SIDE, RunRef, TrackingError, connect

MODEL_TAG = "mixmae"
"""The tag of registered models that are ours; its value is their kind."""


def claim_model_name(uri: str, name: str, kind: str = "classifier") -> None:
    """Check that versions can be added to a registered model of this name; it is created if it is new.

    Args: kind: of the models, all of which take and give the same; "classifier" or "segmenter".
    Raises: TrackingError if the name is something else's, or the store has no registry.
    """
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        known = {model.name: model for model in client.search_registered_models(f"name = '{name}'")}
        if name not in known:
            client.create_registered_model(name, tags={MODEL_TAG: kind})
            return
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"The model {name!r} cannot be registered in {uri} ({str(error).splitlines()[0][:300]}): correct the name "
            "or the store."
        ) from error
    theirs = known[name].tags.get(MODEL_TAG)
    if theirs is None:
        raise TrackingError(f"The registered model {name!r} in {uri} is not one of ours: choose another name.")
    if theirs != kind:
        raise TrackingError(f"The registered model {name!r} in {uri} is a {theirs}, and this a {kind}: choose another.")


def register_model(run: RunRef, model: Any, example: Any, name: str, metadata: Mapping[str, Any]) -> str:
    """Add a version to a registered model, as a program of torch.export that needs none of our code.

    Args:
        run: the finished run that made it.
        model: a torch module.  example: an array of its inputs, 2 or more of them (torch.export fixes sizes of 1).
    Returns: the version; the alias "best" points at it.
    """
    import mlflow
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(run.uri)
    with torch.no_grad():
        output = model(torch.from_numpy(example)).numpy()
    inputs, outputs = (Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))]) for array in (example, output))
    with mlflow.start_run(run_id=run.run_id, log_system_metrics=False):
        info = mlflow.pytorch.log_model(
            model,
            name="model",
            signature=ModelSignature(inputs, outputs),
            input_example=example,
            registered_model_name=name,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", "mlflow"],
            metadata=dict(metadata),
        )
    version = str(info.registered_model_version)
    connect(run.uri).set_registered_model_alias(name, "best", version)
    return version


def model_link(name: str, version: str) -> str:
    """The page of a registered version, for the descriptions that MLflow's pages show."""
    return f"#/models/{name}/versions/{version}?{TRAINING_SIDE}"
