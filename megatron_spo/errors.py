"""How a command ends before its end: one exception per exit code, its message for the user."""


class UserError(Exception):
    """The input is wrong: the message names the file, row or key and the remedy.

    Commands print it without a traceback and exit with its code.
    """

    code = 2


class Anomaly(Exception):
    """The training went wrong, not the input: a number that is not finite, or a spike; no weight was changed."""

    code = 3


class LostRank(Exception):
    """Another process of the job died, hangs or never came."""

    code = 4


class NotSaved(Exception):
    """The last checkpoint could not be written; the earlier ones are as they were."""

    code = 5


class Stopped(BaseException):
    """A signal or the time limit asked for the end; the same command goes on from here.

    Like KeyboardInterrupt no `Exception`: nothing that handles errors may mistake it for one.
    """

    code = 75
