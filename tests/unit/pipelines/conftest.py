"""What tests of the command lines share: no cluster, and the sentence that a mistake ends with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mixmae.training import cluster
from pipelines import knn, run


@pytest.fixture
def no_cluster(monkeypatch, tmp_path):
    """Any attempt to start Ray or MLflow fails the test: these errors must come first."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("reached the cluster or MLflow")

    monkeypatch.chdir(tmp_path)  # the default output is below the working directory
    monkeypatch.setattr(cluster, "connect", refuse)
    for module in (run, knn):
        monkeypatch.setattr(module, "create_run", refuse)


@pytest.fixture
def error(capsys) -> Callable[..., str]:
    """Runs a command that must fail: error(main, *arguments, code=1) is what it prints on stderr, in one line."""

    def fail(main: Callable[[list[str]], int], *argv: object, code: int = 1) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(item) for item in argv])
        assert stop.value.code == code
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return " ".join(text.replace("│", " ").split())  # mistakes of the command line come in a box

    return fail
