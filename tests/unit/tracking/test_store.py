"""Which store is used, and which are refused."""

import pytest

from mixmae.tracking import TrackingError, resolve_uri


def test_default_store_is_absolute_sqlite(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None, tmp_path / "a" / "..") == f"sqlite:///{tmp_path}/mlflow.db"


def test_given_uri_wins_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:1")
    assert resolve_uri(None, tmp_path) == "http://elsewhere:1"
    assert resolve_uri("http://here:2/", tmp_path) == "http://here:2"


def test_an_empty_variable_is_as_if_unset(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert resolve_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_folders_whose_address_would_be_that_of_another_one(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("50% é #1", "a b"):
        assert resolve_uri(None, tmp_path / name) == f"sqlite:///{tmp_path}/{name}/mlflow.db"
    for name in ("really?", "%41"):
        with pytest.raises(TrackingError, match=r"cannot keep its file in .*: choose another --output"):
            resolve_uri(None, tmp_path / name)
    assert resolve_uri("http://here:2", tmp_path / "%41") == "http://here:2"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "sqlite:///relative.db"])
def test_stores_that_cannot_work_are_refused(uri, tmp_path):
    with pytest.raises(TrackingError, match=r"ABSOLUTE|absolute"):
        resolve_uri(uri, tmp_path)
