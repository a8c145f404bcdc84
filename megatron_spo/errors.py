"""The exceptions that end a command early: one per exit code, with a message for the user."""


class UserError(Exception):
    """The input is wrong; the message names the file, row or key and the remedy.

    Commands print the message without a traceback and exit with `code`.
    """

    code = 2


class Anomaly(Exception):
    """Training failed although the input is valid: a non-finite number, a gradient spike or a monitor alarm."""

    code = 3


class LostRank(Exception):
    """Another process of the job died, hangs or never connected."""

    code = 4


class NotSaved(Exception):
    """The last checkpoint could not be written; earlier checkpoints are unchanged."""

    code = 5


class StageFailed(Exception):
    """A command that this command has started failed; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Stopped(BaseException):
    """A signal or the time limit requested the stop; the same command resumes from here.

    Like KeyboardInterrupt it is not an `Exception`, so that no error handler catches it by mistake.
    """

    code = 75
