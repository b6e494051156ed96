"""Settings for all tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tiny tensors gain nothing from threads, and on a busy machine threads that wait for each other cost up to 50 times as
# much.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes: tests of one file stay together, and all that start Ray are one process's, first.

    Two clusters at once would be slower than one after the other, and the rest takes about as long as they do.
    """
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes and digests of the tests' files are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of MLflow to copy: to make one takes it 7 s, all but the first of which a copy saves."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path
