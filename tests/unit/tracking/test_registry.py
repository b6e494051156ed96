"""Names of registered models."""

import shutil

import pytest

from mixmae.tracking import TrackingError, claim_model_name


@pytest.mark.timeout(120)
def test_the_name_of_a_model_that_is_not_ours_is_refused(tmp_path, mlflow_db):
    from mlflow import MlflowClient

    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    claim_model_name(uri, "shapes")
    claim_model_name(uri, "shapes")  # ours: it gets another version
    MlflowClient(tracking_uri=uri).create_registered_model("theirs")
    with pytest.raises(TrackingError, match=r"'theirs' .* is not one of ours: choose another name"):
        claim_model_name(uri, "theirs")
    with pytest.raises(TrackingError, match=r"'shapes' .* is a classifier, and this a segmenter: choose another"):
        claim_model_name(uri, "shapes", "segmenter")
