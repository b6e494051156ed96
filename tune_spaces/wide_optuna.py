"""The wide space, searched by Optuna."""

from dataclasses import replace

from tune_spaces import wide

SPACE = replace(
    wide.SPACE,
    about="""The wide space searched by Optuna's TPE, which learns from the trials so far; needs mixmae[sweep].""",
    search="optuna",
)
