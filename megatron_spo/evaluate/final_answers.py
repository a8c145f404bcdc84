"""Extracts the final answer of a text and compares it with the expected one.

Numbers are compared by their exact values. Other mathematics is compared by math-verify, which is imported when the
first row needs it.
"""

import logging
import re
from fractions import Fraction

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)"
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_NUMBER = (
    r"(?P<sign>(?<![\w)])[-−]\s?)?(?:[$€£](?P<minus>-)?)?(?:(?P<whole>\d{1,9})\s+(?=\d+\s?/\s?\d))?"
    rf"(?P<number>{_DIGITS})(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w))?(?:\s?/\s?(?P<under>\d+)(?!\d*[./]\d))?"
    rf"(?:\s(?P<scale>{'|'.join(_SCALES)})\b)?"
)
_NUMBERS = re.compile(_NUMBER)
_UNIT = (  # words; the text has single spaces only
    r"(?:[ %°²³]|(?:[mgshlL]|[^\W\d_]{2,})\b|[(][^\d=()]*[)]|(?<=[^\W\d_]) ?\^?\{?[23]\}?|/(?=[^\W\d_]))*"
)
_ONE_NUMBER = re.compile(rf"(?:[^\W\d_]{{1,2}}\s*=\s*)?{_NUMBER}{_UNIT}[.!]?")
_ENDS_IN_NUMBER = re.compile(rf"{_NUMBER}[\s.!%)*$]*\Z")
_BOXED = "\\boxed{"
_LATEX = (  # replacements, applied in this order
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!; ])(?=\d{3}(?!\d))"), ""),  # thousands
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm|operatorname)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)\s*\\[dtc]?frac"), r" \\frac"),  # mixed numbers
    (re.compile(r"\\[dtc]?frac\s*\{\s*(-?[\d,.]+)\s*\}\s*\{\s*(\d+)\s*\}"), r"\1/\2"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "°"),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\(?:[,;:! ]|quad|left|right|displaystyle)|\\[()\[\]]"), " "),
    (re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\S)|(?<=\S)[*_](?!\w)"), ""),  # markdown
    (re.compile(r"\$(?!\s*[-−\d.])"), ""),  # the end of a formula; before a number it may be a currency
)
_MATHEMATICS = re.compile(r"\\[a-zA-Z]|[\^√π]|\d\s*[-+*/,]\s*[\w(]|[(\[]\s*-?\d|[a-z]\s*=")
_TOO_MUCH = re.compile(r"\^\s*\{[^{}]*\^|\^\s*\w+\s*\^|\^\s*\{?\s*-?\d{4,}|\)\s*\^\s*\{?\s*\d{3,}|\d{3,}\s*!")
"""Powers and factorials whose evaluation could take forever."""
_PATIENCE = 120
"""Timeout in seconds, far above what an expression takes: a score must not depend on the load of the machine."""
_LONGEST = 300
"""Most characters of a number, or of an expression that is compared as mathematics."""


def final_answer(text: str) -> str | None:
    """Returns the result that a text gives, or None.

    This is the first number after the last `####` (the whole line if it has no number) or the content of the last
    \\boxed{}, whichever comes later; without either, it is the last number.
    """
    if (result := marked(text)) is not None:
        return _first_number(result) or result if _marked_by_hashes(text) else result
    numbers = list(_NUMBERS.finditer(_plain_text(text)))
    return numbers[-1][0] if numbers else None


def is_match(text: str, expected: str) -> bool:
    """Returns whether a text's final answer, or the whole text, is the expected one.

    Numbers are compared by value, anything else by its words or as mathematics.
    """
    given = final_answer(text)
    wanted = number_of(expected)
    if wanted is not None:
        value = None if given is None else number_of(given)
        if value is not None or given is None:
            return value == wanted
    if _words(expected) in {_words(text), _words(given or ""), _words(marked(text) or "")}:
        return True
    return given is not None and _same_mathematics(given, expected)


def number_of(text: str) -> Fraction | None:
    """Returns the value of a text that is a single number, or None.

    The number may have a currency, percent sign or unit, and may be written in LaTeX or markdown.
    """
    found = _ONE_NUMBER.fullmatch(" ".join(_plain_text(text).split()))
    return None if found is None else _value(found)


def marked(text: str) -> str | None:
    """Returns the result that a text marks by `####` or \\boxed{}, whichever comes later; None without a mark."""
    if _marked_by_hashes(text):
        return text[text.rfind("####") + 4 :].strip().partition("\n")[0].strip() or None
    boxed = text.rfind(_BOXED)
    depth, start = 1, boxed + len(_BOXED)
    for place in range(start, len(text) if boxed >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip() or None
    return None


def number_at_end(text: str) -> str | None:
    """Returns the number that a text ends in, or None."""
    found = _ENDS_IN_NUMBER.search(_plain_text(text))
    return None if found is None else final_answer(found[0])


def _marked_by_hashes(text: str) -> bool:
    return text.rfind("####") > text.rfind(_BOXED)


def _first_number(text: str) -> str | None:
    found = _NUMBERS.search(_plain_text(text))
    return None if found is None else found[0]


def _plain_text(text: str) -> str:
    """Removes the LaTeX and markdown markup that would hide numbers and their units."""
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _LONGEST:  # Python refuses to convert numbers of thousands of digits
        return None
    under = int(found["under"] or 1)
    if under == 0:
        return None
    value = Fraction(found["number"].replace(",", "")) * Fraction(10) ** int(found["power"] or 0) / under
    value = (value + int(found["whole"] or 0)) * _SCALES.get(found["scale"] or "", 1)
    return -value if found["sign"] or found["minus"] else value


def _words(text: str) -> str:
    return " ".join(_plain_text(text).casefold().split()).rstrip(".")


def _same_mathematics(given: str, expected: str) -> bool:
    """Returns whether math-verify finds two expressions equal; False if it cannot parse them or might not finish."""
    both = (given, expected)
    if any(len(one) > _LONGEST or _TOO_MUCH.search(one) for one in both):
        return False
    if not all(_MATHEMATICS.search(one) or number_of(one) is not None for one in both):
        return False
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs tracebacks of parse errors
    try:
        found, right = (parse(f"${one}$", parsing_timeout=_PATIENCE) for one in both)
        return bool(found and right) and bool(verify(right, found, timeout_seconds=_PATIENCE))
    except Exception:  # sympy's and antlr's errors have no common base
        return False
