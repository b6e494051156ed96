"""The command line of every pipeline: parse, run, and turn what users get wrong into one sentence.

Exit status: 0 done, 1 it cannot be done (the sentence on stderr says why and what to do), 2 the command line is wrong,
130 interrupted by Ctrl-C, 141 nobody reads what it prints any more (`| head`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import tyro

from mixmae.lock import release_all
from mixmae.machine import ray_folder, settle_environment
from mixmae.training.failures import TrainingStopped, WorkersFailed
from pipelines.console import fail

if TYPE_CHECKING:
    from mixmae.jobs.config import RunConfig

ArgumentsT = TypeVar("ArgumentsT")

TRY_AGAIN = os.EX_TEMPFAIL if hasattr(os, "EX_TEMPFAIL") else 75
"""Exit status of a run whose workers failed more often than they may: a scheduler may start the command again. 1: it
would fail again; 2: the command line is wrong; 128 + N: signal N ended it, and the same command continues."""
FORMER_FLAGS = {"--loop.panel-every-epochs": "--loop.evaluate-every-epochs", "--resize-share": "--crop-pct"}
"""Flags that were renamed, by their names in earlier versions, which are still understood."""


def command(
    action: Callable[[ArgumentsT], int],
    arguments_type: type[ArgumentsT],
    argv: list[str] | None,
    *,
    program: str,
    about: str | None,
) -> int:
    """The command line of a pipeline without recipes.

    Args:
        action: what is run; it returns the process's exit status.
        arguments_type: dataclass of the flags.  argv: without the program's name; None: the process's own.
        program: name of the file.  about: the file's docstring, shown by --help.
    Returns: the exit status.   Raises: SystemExit, after the sentence was printed.
    """
    argv = _settle(argv)
    arguments = _parse(arguments_type, argv, prog=program, description=about)
    return _run(lambda: action(arguments))


def recipe_command(
    action: Callable[[ArgumentsT, str], int],
    arguments_type: type[ArgumentsT],
    argv: list[str] | None,
    *,
    program: str,
    about: str | None,
    recipes: Mapping[str, Callable[[], Any]],
    kind: str = "recipe",
) -> int:
    """The command line of a pipeline whose first argument names a recipe, which gives the flags their defaults.

    Args: recipes: by name.  kind: the word for what it takes, if not a recipe.  Others: as in command; the action also
        gets the recipe's name.
    Returns, Raises: as command.
    """
    argv = _settle(argv)
    from pipelines.recipes import find_recipe, list_recipes  # they bring torch, which not every pipeline needs

    usage = f"usage: python pipelines/{program} {kind.upper()} [options]\n\n{kind}s:\n{list_recipes(recipes)}\n"
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{about}\n{usage}\n{kind.upper()} --help lists the options and fields.")
        return 0 if argv else 2
    try:
        recipe = find_recipe(argv[0], recipes, kind)
        default = arguments_type(config=recipe())  # type: ignore[call-arg]
    except ValueError as error:
        fail(error, code=2)
    arguments = _parse(
        arguments_type,
        argv[1:],
        default=default,
        prog=f"{program} {recipe.__name__}",
        description=recipe.__doc__,
        # A recipe settles which encoder and which method: their fields are flags, not subcommands.
        config=(tyro.conf.AvoidSubcommands,),
    )
    _refuse_unused_size(argv, arguments.config)  # type: ignore[attr-defined]
    return _run(lambda: action(arguments, recipe.__name__))


def _settle(argv: list[str] | None) -> list[str]:
    """See that the environment, the locale and the terminal are none that a command fails by.

    Args, Returns: the command line; None: the process's own.
    """
    # Arrow, Ray and MLflow take names of files for UTF-8: in another locale begin again, in Python's UTF-8 mode.
    if argv is None and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what cannot be printed, such as names not in UTF-8, is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        settle_environment()
    except ValueError as error:
        fail(error)
    return sys.argv[1:] if argv is None else argv


def _refuse_unused_size(argv: list[str], config: RunConfig) -> None:
    """There is one size, that of the images: a flag for the encoder that says another one would have no effect."""
    given = any(_flag(word) == "--encoder.image-size" for word in argv)
    if given and config.encoder.image_sides != config.augment.size:
        fail(
            f"--encoder.image-size is {config.encoder.image_size}, but the images are of {config.augment.image_size} "
            "px, which the encoder is built for: give --augment.image-size alone.",
            code=2,
        )


def _flag(word: str) -> str:
    """The flag of a command line's word as --help writes it."""
    return word.partition("=")[0].replace("_", "-")


def _parse(arguments_type: type[ArgumentsT], argv: list[str], **options: Any) -> ArgumentsT:
    words = [FORMER_FLAGS[flag] + word[len(flag) :] if (flag := _flag(word)) in FORMER_FLAGS else word for word in argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(arguments_type, args=words, **options)
    except ValueError as error:  # of a dataclass's own check
        fail(error, code=2)
    except BrokenPipeError:
        _end_unread()
    except SystemExit:
        # tyro puts the error of a part's own check into a box, where it names fields and not flags.
        text = " ".join(said.getvalue().replace("│", " ").split())
        if check := re.search(r"Error parsing ([\w.]+): (.*?) (?:[─╰]|-{5})", text):
            fail(_with_flags(check[2], check[1], options.get("default")), code=2)
        sys.stderr.write(said.getvalue())
        raise


def _with_flags(text: str, path: str, default: object) -> str:
    """Write the names of fields in a dataclass's own error as the flags they are.

    Args: path: of the dataclass in the arguments, such as config.encoder.  default: the arguments' defaults.
    """
    for name in path.split("."):
        default = getattr(default, name, None)
    fields = {field.name for field in dataclasses.fields(default)} if dataclasses.is_dataclass(default) else set()
    prefix = path.removeprefix("config.")
    return re.sub(
        r"\b\w+\b", lambda word: f"--{prefix}.{word[0].replace('_', '-')}" if word[0] in fields else word[0], text
    )


def _end_unread() -> NoReturn:
    """End as a shell reports a program that the signal SIGPIPE ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more when it ends
    raise SystemExit(141)


def _run(action: Callable[[], int]) -> int:
    try:
        status = action()
        sys.stdout.flush()  # here, where it is known what to do if nobody reads it
        return status
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:
        _end_unread()
    except WorkersFailed as error:
        fail(
            f"{error}\nThe worker's log with the whole trace is below the session's folder logs/train (see Ray's "
            f"dashboard or {ray_folder()}/session_latest). The same command continues from the last checkpoint.",
            code=TRY_AGAIN,
        )
    except (ValueError, OSError, TrainingStopped) as error:
        fail(error)
    finally:
        release_all()
