"""Sampled answers to a prompt."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answered:
    """A row of answers; `where` is its file and line."""

    where: str
    row: dict[str, Any]

    @property
    def responses(self) -> list[str]:
        """The answers."""
        texts: list[str] = self.row["responses"]
        return texts


def completion(prompt: Any, text: str) -> Any:
    """Returns an answer in the form of its prompt: a string, or a list of one assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
