"""Messages to text by the tokenizer's chat template: the same text for a row on every day and in every command."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from megatron_spo.data.json_lines import RowProblem, check_text
from megatron_spo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATE = datetime(2024, 7, 26)
"""The day that a template is told, Llama 3's own fallback. It is a constant and not the day of the first pass, so that
an exported model answers the prompts that it was trained on, wherever and whenever `generate` is called. A row chooses
another day with `chat_template_kwargs: {"date_string": ...}` if its template reads that."""
DATE_STRING = DATE.strftime("%d %b %Y")
_CLOCKS = re.compile(r"\b(?:strftime_now|date_string)\b")


def template_date(tokenizer: PreTrainedTokenizerFast) -> str:
    """The date that the tokenizer's chat templates are told, YYYY-MM-DD; empty if none of them asks for it."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    asked = any(isinstance(text, str) and _CLOCKS.search(text) for text in texts)
    return DATE.strftime("%Y-%m-%d") if asked else ""


class ChatTemplate:
    """The chat template of a tokenizer that has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._ours = {"messages", *parameters} - {"tools", "documents"}

    def render(self, messages: list[dict[str, Any]], given: Mapping[str, Any], field: str, *, generation: bool) -> str:
        """The text of messages, with the start of an answer if `generation`; `given`: what the row has for the template
        besides them. RowProblem, about `field`, where the template refuses the messages.

        Raises:
            UserError: the template can render no row.
        """
        from jinja2 import TemplateSyntaxError

        try:
            self._prepare(given)
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **{"date_string": DATE_STRING, **given}
            )
            check_text(text, field)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); name another one in "
                "data.chat_template, or mend the tokenizer's"
            ) from error
        except RowProblem as problem:
            if problem.field != field:
                raise
            raise RowProblem(field, f"as the chat template renders it, {problem.reason}") from problem
        except Exception as error:  # templates raise jinja2's errors and whatever their own code raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowProblem(field, f"is refused by the chat template: {reason}") from error
        return str(text)

    def _prepare(self, given: Mapping[str, Any]) -> None:
        """Stop the template's clock, and refuse what the row gives in vain."""
        # transformers has no public way to set the time: its strftime_now is a global of the compiled template, which
        # this function keeps and apply_chat_template gets again (since 4.43; in 5.24 as well)
        from transformers.utils.chat_template_utils import _compile_jinja_template

        text = self._tokenizer.get_chat_template(None, given.get("tools"))
        _compile_jinja_template(text).globals["strftime_now"] = DATE.strftime
        for name in given:
            source = "tools" if name == "tools" else "chat_template_kwargs"
            if name in self._ours:
                raise RowProblem(source, f"sets {name!r}, which is not up to a row; remove it")
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise RowProblem(
                    source, f"gives {name!r}, which the chat template does not read; remove it from the row, or name a "
                    "template that reads it in data.chat_template"
                )  # fmt: skip
