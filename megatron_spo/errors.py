"""The one exception for wrong input."""


class UserError(Exception):
    """The input is wrong: the message names the file, row or key and the remedy.

    Commands print it without a traceback and exit with code 2.
    """
