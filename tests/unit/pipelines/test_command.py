"""The command line that the pipelines share: flags of earlier versions, flags without an effect."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipelines.command import FORMER_FLAGS, command, recipe_command
from pipelines.finetune import Arguments
from pipelines.recipes import FINETUNE_RECIPES


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
