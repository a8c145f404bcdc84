"""Calls a user's scoring function in a separate process, so that it can be ended if it hangs or crashes."""

import importlib
import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

from megatron_spo.errors import UserError
from megatron_spo.on_policy.answered import Answered, completion

START = 300
"""Seconds that the import of the module may take."""


class FunctionProcess:
    """A process that imports `MODULE:NAME`, searching the current folder first, and calls it for one row after another.

    The function has the signature of TRL's reward functions. It is called with `prompts` and `completions`, lists with
    one entry per response, and every other key of the row as such a list. It returns a list of numbers.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        context = get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, os.getcwd(), child), daemon=True)
        self._process.start()
        child.close()

    def __enter__(self) -> Self:
        """Waits until the function is imported.

        Raises:
            UserError: it cannot be imported.
        """
        try:
            self._receive(f"the function {self._name}", "cannot be imported", START)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, one: Answered) -> Any:
        """Returns what the function returns for a row.

        Raises:
            UserError: it raises an error, its process ends, or it takes longer than the timeout.
        """
        self._pipe.send(arguments_of(one))
        return self._receive(f"{one.where}: the function {self._name}", "failed", self._timeout)

    def _receive(self, what: str, failed: str, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise UserError(f"{what} did not return within {seconds:g} seconds; correct it, or raise --timeout")
        try:
            fine, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise UserError(f"{what} {failed}: its process ended with exit code {self._process.exitcode}") from None
        if not fine:
            raise UserError(f"{what} {failed}: {value}")
        return value

    def _end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def arguments_of(one: Answered) -> dict[str, list[Any]]:
    """Returns the keyword arguments of the function for a row; with messages, a completion is a list of one message."""
    prompt, texts = one.row["prompt"], one.responses
    own = ("prompt", "responses", "finished", "completion", "prompts", "completions")
    found: dict[str, list[Any]] = {key: [value] * len(texts) for key, value in one.row.items() if key not in own}
    found["prompts"] = [prompt] * len(texts)
    found["completions"] = [completion(prompt, text) for text in texts]
    return found


def _serve(name: str, folder: str, pipe: Connection) -> None:
    """Sends (True, value) or (False, error message) for the import, and then for each call."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, folder)

    def load() -> Callable[..., Any]:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
        if not callable(function):
            raise TypeError(f"{attribute} is not callable")
        return function

    function = _answer(pipe, load, lambda found: None)
    while function is not None:
        try:
            given = pipe.recv()
        except EOFError:  # the command has ended
            return
        _answer(pipe, lambda given=given: function(**given), _plain)  # type: ignore[misc]


def _answer(pipe: Connection, call: Callable[[], Any], shown: Callable[[Any], Any]) -> Any:
    """Sends the result of a call, and returns it; None if it raised an error."""
    try:
        found = call()
        pipe.send((True, shown(found)))
        return found
    except BaseException as error:  # the user's code may raise anything, SystemExit included
        pipe.send((False, " ".join(f"{type(error).__name__}: {error}".split())[:500]))
        return None


def _plain(scores: Any) -> Any:
    """Returns arrays, tensors and their elements as lists and numbers, because the command may lack their package."""
    if hasattr(scores, "tolist"):
        return scores.tolist()
    return [score.item() if hasattr(score, "item") else score for score in scores] if isinstance(
        scores, list | tuple
    ) else scores  # fmt: skip
