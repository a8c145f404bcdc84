"""Renders messages with the chat template of the tokenizer, independent of the date and of the command."""

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
"""The date given to templates; the default of Llama 3. It is constant so that an exported model gets the same prompts
as in training, whenever `generate` is called. A row can set another date with `chat_template_kwargs:
{"date_string": ...}` if its template reads that."""
DATE_STRING = DATE.strftime("%d %b %Y")
_CLOCKS = re.compile(r"\b(?:strftime_now|date_string)\b")


def template_date(tokenizer: PreTrainedTokenizerFast) -> str:
    """Returns the date given to the chat templates of the tokenizer (YYYY-MM-DD), or "" if none of them uses it."""
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
        """Renders messages to text.

        Args:
            messages: the messages.
            given: further template variables of the row.
            field: the field to name in errors.
            generation: append the start of an assistant turn.

        Raises:
            RowProblem: the template rejects the messages.
            UserError: the template is invalid for all rows.
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
                f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); correct it, or "
                "set data.chat_template to another template"
            ) from error
        except RowProblem as problem:
            if problem.field != field:
                raise
            raise RowProblem(field, f"as rendered by the chat template, {problem.reason}") from problem
        except Exception as error:  # templates can raise any exception
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowProblem(field, f"is rejected by the chat template: {reason}") from error
        return str(text)

    def _prepare(self, given: Mapping[str, Any]) -> None:
        """Sets the date of the template, and rejects variables of the row that it does not use."""
        # transformers has no public way to set the date: strftime_now is a global of the compiled template, which
        # this function caches for apply_chat_template (from 4.43 to at least 5.24)
        from transformers.utils.chat_template_utils import _compile_jinja_template

        text = self._tokenizer.get_chat_template(None, given.get("tools"))
        _compile_jinja_template(text).globals["strftime_now"] = DATE.strftime
        for name in given:
            source = "tools" if name == "tools" else "chat_template_kwargs"
            if name in self._ours:
                raise RowProblem(source, f"sets {name!r}, which a row cannot set; remove it")
            if not re.search(rf"\b{re.escape(name)}\b", text):
                raise RowProblem(
                    source, f"sets {name!r}, which the chat template does not use; remove it, or set "
                    "data.chat_template to a template that uses it"
                )  # fmt: skip
