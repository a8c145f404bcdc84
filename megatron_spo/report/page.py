"""The HTML around tables and pictures: one file, no network, light and dark, readable on a phone."""

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.legend { grid-column: 1 / -1; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; }
svg { width: 100%; height: auto; }
"""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """HTML table that scrolls by itself where it is wider than the screen."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def legend(colours: Mapping[str, str]) -> str:
    """Names with their colours."""
    entries = "".join(f'<span><i style="background:{c}"></i>{html.escape(name)}</span> ' for name, c in colours.items())
    return f'<div class="legend">{entries}</div>'


def section(title: str, *parts: str, grid: bool = False) -> str:
    """A titled section of HTML parts; `grid` lays them side by side where the screen is wide."""
    body = "\n".join(parts)
    return f"<h2>{html.escape(title)}</h2>\n" + (f'<div class="grid">{body}</div>' if grid else body)


def write_page(out: Path, title: str, parts: Sequence[str]) -> None:
    """Writes the page, complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
    )
    body = f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(head + body, encoding="utf-8")
    os.replace(partial, out)
