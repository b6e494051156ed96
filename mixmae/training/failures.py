"""How training ends early. Apart from loop and workers, so that a command line needs neither torch nor Ray."""


class TrainingStopped(RuntimeError):
    """Training cannot go on and a restart would not help; the message is for the user."""


class WorkersFailed(RuntimeError):
    """Workers failed more often than they may be restarted; the message has the first cause in one line."""


class FolderLost(RuntimeError):
    """Another run has taken over the folder: this one may not write there any more."""


class EvaluationSkipped(RuntimeError):
    """Raised by `evaluate` on every rank to skip this evaluation; training continues and the reason is logged once."""


class Interrupted(KeyboardInterrupt):
    """A signal has ended a run; the same command continues it."""

    def __init__(self, number: int) -> None:
        """Args: number: of the signal."""
        super().__init__(f"signal {number}")
        self.exit_status = 128 + number
        """As a shell reports a program that a signal has ended: 130 for SIGINT, 143 for SIGTERM."""
