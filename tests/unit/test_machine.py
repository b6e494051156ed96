"""The cores that a process may use, the environment that libraries can live with, and folders for what is no result."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest

from mixmae import machine

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")


@pytest.fixture
def eight_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 8), ("?", 8)]
)
def test_quota_of_the_container(eight_cores, quota, cores):
    (eight_cores / "cpu.max").write_text(f"{quota}\n")
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("300000", 3)])
def test_quota_of_the_first_version(eight_cores, quota, cores):
    (eight_cores / "cpu").mkdir()
    (eight_cores / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (eight_cores / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores() == cores


def test_without_a_quota_it_is_the_affinity(eight_cores):
    assert machine.usable_cores() == 8


@needs_affinity
def test_affinity_of_this_process():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_threads_share_the_cores(eight_cores):
    assert [machine.threads_per_process(count) for count in (1, 3, 8, 20)] == [8, 2, 1, 1]


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment as the test may change it, with a folder for temporary files."""
    before = dict(os.environ)
    monkeypatch.setattr(tempfile, "tempdir", None)  # what is kept of TMPDIR
    (tmp_path / "t").mkdir()
    os.environ["TMPDIR"] = str(tmp_path / "t")
    yield os.environ
    os.environ.clear()
    os.environ.update(before)


def test_empty_variables_are_dropped_where_they_mean_nothing(environment):
    dropped = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", "XDG_CACHE_HOME", "TMPDIR", "HOME")
    kept = ("CUDA_VISIBLE_DEVICES", "http_proxy", "MIXMAE_TEST")
    environment.update(dict.fromkeys((*dropped, *kept), ""))
    machine.settle_environment()
    assert not [name for name in dropped if environment.get(name) == ""]
    assert [environment[name] for name in kept] == ["", "", ""]


def test_a_user_whom_the_system_does_not_know_has_a_name(environment, monkeypatch, tmp_path):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        environment.pop(name, None)
    environment["HOME"] = str(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    machine.settle_environment()
    assert getpass.getuser() == "user54321"
    assert environment["HOME"] == str(tmp_path)


@pytest.mark.parametrize("home", ["/nonexistent", "not/absolute", None])
def test_without_a_home_there_is_one_below_the_temporary_files(environment, monkeypatch, tmp_path, home):
    if home is None:  # and the system does not know one
        environment.pop("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
        environment["USER"] = "me"
    else:
        environment["HOME"] = home
    assert machine.home_folder() is None
    machine.settle_environment()
    assert Path.home() == machine.own_temporary_folder() == tmp_path / "t" / f"mixmae-{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_matplotlib_has_a_folder_beside_a_home_that_cannot_be_written(environment, tmp_path):
    environment.pop("MPLCONFIGDIR", None)
    (tmp_path / "home").mkdir(mode=0o500)
    environment["HOME"] = str(tmp_path / "home")
    machine.settle_environment()
    assert environment["MPLCONFIGDIR"] == str(machine.own_temporary_folder() / "matplotlib")
    assert environment["HOME"] == str(tmp_path / "home")


def test_folders_for_what_can_be_made_again(environment, tmp_path):
    own = tmp_path / "t" / f"mixmae-{os.getuid()}" / "mixmae"
    environment.update({"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert list(machine.cache_folders()) == [tmp_path / "cache" / "mixmae", tmp_path / ".cache" / "mixmae", own]
    environment.update({"XDG_CACHE_HOME": "relative"})
    assert list(machine.cache_folders()) == [tmp_path / ".cache" / "mixmae", own]
    environment.update({"HOME": "/nonexistent", "XDG_CACHE_HOME": ""})
    assert list(machine.cache_folders()) == [own]


def test_a_folder_of_another_user_is_not_taken(environment, monkeypatch, tmp_path):
    environment["HOME"] = str(tmp_path)
    other = os.getuid() + 1
    (tmp_path / "t" / f"mixmae-{other}").mkdir()  # made by this user and not by that one
    monkeypatch.setattr(os, "getuid", lambda: other)
    assert list(machine.cache_folders())[-1].parent == tmp_path / ".cache"
    with pytest.raises(ValueError, match=r"is another user's: set TMPDIR"):
        machine.own_temporary_folder()


def test_ray_gets_a_folder_that_is_short_enough_for_its_sockets(environment, monkeypatch, tmp_path):
    environment.pop("RAY_TMPDIR", None)
    long = tmp_path / ("x" * 110)
    long.mkdir()
    environment["TMPDIR"] = str(long)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert machine.ray_folder() == Path("/tmp/ray")
    monkeypatch.setattr(machine, "SHORT_FOLDERS", (long,))
    with pytest.raises(ValueError, match=r"set RAY_TMPDIR to such a folder"):
        machine.ray_folder()
    environment["RAY_TMPDIR"] = str(long)
    with pytest.raises(ValueError, match=r"RAY_TMPDIR is .*a path of at most 36 bytes"):
        machine.ray_folder()
    environment["RAY_TMPDIR"] = "/tmp"
    assert machine.ray_folder() == Path("/tmp/ray")
