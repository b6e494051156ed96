"""The command line that the pipelines share: flags of earlier versions, flags without an effect, odd environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.command import FORMER_FLAGS, command, recipe_command
from pipelines.finetune import Arguments
from pipelines.recipes import FINETUNE_RECIPES
from tests.factories import jpeg

ROOT = Path(__file__).parents[3]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale in which Python takes names of files for ASCII."""


def parsed(*argv: str) -> Arguments:
    """What demo_finetune is given."""
    seen: list[Arguments] = []

    def action(arguments: Arguments, recipe: str) -> int:
        seen.append(arguments)
        return 0

    options = {"program": "finetune.py", "about": "", "recipes": FINETUNE_RECIPES}
    assert recipe_command(action, Arguments, ["demo_finetune", *argv], **options) == 0
    return seen[0]


@pytest.mark.parametrize("old", FORMER_FLAGS)
@pytest.mark.parametrize("form", ["hyphens", "underscores", "equals"])
def test_flags_of_earlier_versions_are_understood(old, form):
    word = old if form != "underscores" else "--" + old[2:].replace("-", "_")
    argv = [f"{word}=0.5"] if form == "equals" else [word, "0.5"]
    assert parsed(*argv) == parsed(FORMER_FLAGS[old], "0.5") != parsed()


def test_a_size_of_the_encoder_that_has_no_effect_is_refused(capsys):
    for argv in (["--encoder.image-size", "96"], ["--encoder.image_size=64", "--augment.image-size", "96"]):
        with pytest.raises(SystemExit) as stop:
            parsed(*argv)
        assert stop.value.code == 2
        assert "give --augment.image-size alone" in capsys.readouterr().err
    assert parsed("--encoder.image-size", "64", "--augment.image-size", "64") == replace_size(64)
    assert parsed("--augment.image-size", "64").config.sized_encoder().image_sides == (64, 64)


def test_a_part_that_does_not_fit_is_refused_with_its_flags(capsys):
    for argv, sentence in (
        (["--encoder.num-heads", "3", "4", "4"], "change --encoder.embed-dim or --encoder.num-heads"),
        (["--encoder.patch-px", "3"], "--encoder.patch-px must be one of 1, 2, 4, 8, got 3"),
        (["--loop.batch-size", "0"], "--loop.batch-size is 0: it must be above 0."),
    ):
        with pytest.raises(SystemExit) as stop:
            parsed(*argv)
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert said.startswith("error: ")
        assert said.strip().endswith(sentence)


def test_other_mistakes_are_explained_by_the_parser(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--loop.batch-size", "many")
    assert stop.value.code == 2
    assert "Global batch: images per optimiser step" in capsys.readouterr().err


def replace_size(size: int) -> Arguments:
    """What both flags together give."""
    from dataclasses import replace

    default = parsed()
    config = default.config
    encoder, augment = replace(config.encoder, image_size=size), replace(config.augment, image_size=size)
    return replace(default, config=replace(config, encoder=encoder, augment=augment))


def test_mistakes_of_any_kind_end_with_a_sentence_and_a_status(capsys):
    @dataclass
    class Nothing:
        number: int = 1

    for error, code in ((ValueError("wrong"), 1), (FileNotFoundError("wrong"), 1), (KeyboardInterrupt(), 130)):

        def action(arguments: Nothing, error: BaseException = error) -> int:
            raise error

        with pytest.raises(SystemExit) as stop:
            command(action, Nothing, [], program="nothing.py", about="")
        assert stop.value.code == code
        assert capsys.readouterr().err in ("error: wrong\n", "error: interrupted\n")


def stats(
    *arguments: object, before: tuple[str, ...] = (), program: str = "stats.py", **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """stats.py, or another program.   Args: before: what starts it.  environment: changes; None: not set."""
    changed = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [*before, sys.executable, str(ROOT / "pipelines" / program), *map(str, arguments)],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.fixture
def cats(tmp_path) -> Path:
    """A folder of one class, whose names are not of ASCII alone."""
    folder = tmp_path / "fötos" / "kätze"
    folder.mkdir(parents=True)
    for row in range(3):
        (folder / f"ü {row}.jpg").write_bytes(jpeg(row))
    (folder / "bröken.jpg").write_bytes(b"no image")
    return folder.parent


def test_other_letters_in_a_locale_of_ascii(cats, tmp_path):
    done = stats(cats, "--output", tmp_path / "stäts", **ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bröken.jpg: not an image" in done.stdout
    assert f"written: {tmp_path / 'stäts' / 'stats.json'}" in done.stdout


def test_what_cannot_be_printed_is_escaped(cats, tmp_path):
    done = stats(cats, "--output", tmp_path / "stäts", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"br\xf6ken.jpg: not an image" in done.stdout


@pytest.mark.parametrize("words", [("stats.py",), ("pretrain.py", "demo", "--help")])
def test_a_reader_that_goes_away_is_no_error(words, cats, tmp_path):
    read, write = os.pipe()
    os.close(read)
    given = (str(cats), "--output", str(tmp_path / "stats")) if words == ("stats.py",) else ()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / words[0]), *words[1:], *given],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not shutil.which("setpriv") or os.getuid() != 0, reason="needs setpriv, and root to call it")
def test_a_user_whom_the_system_does_not_know(cats):
    """It may also read what this Python is made of, which may be in root's own home."""
    rights = ("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search")
    before = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *rights)
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("setpriv may not give these rights here")
    nobody = {"HOME": None, "USER": None, "LOGNAME": None, "TMPDIR": None}
    with tempfile.TemporaryDirectory() as name:  # not in pytest's folder, which is for root alone
        photos, out = shutil.copytree(cats, Path(name) / "photos"), Path(name) / "out"
        out.mkdir()
        for folder, mode in ((name, 0o755), (out, 0o777)):
            os.chmod(folder, mode)
        done = stats(photos, "--output", out / "stats", before=before, **nobody)
        assert (done.returncode, done.stderr) == (0, "")
        assert (out / "stats" / "stats.json").stat().st_uid == 54321
        refused = stats(photos, "--output", Path(name) / "other", before=before, **nobody)
        usage = stats(before=before, program="sweep.py", **nobody)  # Ray Tune wants a home when it is imported
        assert (usage.returncode, usage.stderr) == (2, "")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "cannot write to" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
