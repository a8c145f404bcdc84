"""Builds HTML pages of tables and figures: one file without external resources, for light and dark mode and phones."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_spo.files import write_output

LIGHT = {"back": "#ffffff", "text": "#1b1f24", "muted": "#59636e", "link": "#0b5cad"}
DARK = {"back": "#14171a", "text": "#e6e8ea", "muted": "#a3adb8", "link": "#7cb8f5"}


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; --line: #8886; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""
    + """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
       background: var(--back); color: var(--text); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
a { color: var(--link); } nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
p.verdict { border-left: .4rem solid; padding: .5rem .8rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
p.good { border-color: #3a9d5d; } p.bad { border-color: #c44e52; }
p.facts { margin: .3rem 0 1rem; } p.facts span { display: inline-block; margin-right: 1.2rem; overflow-wrap: anywhere; }
p.note { color: var(--muted); margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; }
table:not(.words) td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
table td:first-child { white-space: normal; min-width: min(14rem, 32vw); max-width: 20rem; overflow-wrap: anywhere; }
table.words td, table.words th { text-align: left; }
table.words td:not(:first-child) { max-width: 28rem; overflow-wrap: break-word; }
table.words td:nth-child(2), table.words td:last-child { min-width: 12rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.grid > p, .legend { grid-column: 1 / -1; } .legend { margin: .3rem 0; }
.legend span { margin-right: 1rem; display: inline-block; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; }
svg { width: 100%; height: auto; max-width: 32rem; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; }
summary { cursor: pointer; overflow-wrap: anywhere; }
dt { color: var(--muted); font-size: .9rem; margin-top: .5rem; } dd { margin: 0; }
pre { font: .875rem/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
"""
)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """Returns an HTML table, which scrolls if it is wider than the screen; `words` is for text instead of numbers."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    start = '<table class="words">' if words else "<table>"
    return f'<div class="scroll">{start}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Returns plain text as an HTML paragraph."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """Returns an explanatory note as an HTML paragraph."""
    return f'<p class="note">{html.escape(text)}</p>'


def verdict(text: str, *, good: bool) -> str:
    """Returns the sentence that answers the reader's first question."""
    return f'<p class="verdict {"good" if good else "bad"}"><strong>{html.escape(text)}</strong></p>'


def facts(words: Sequence[str]) -> str:
    """Returns short facts in one paragraph."""
    return (
        '<p class="facts">' + " ".join(f"<span>{html.escape(word)}</span>" for word in words) + "</p>" if words else ""
    )


def heading(text: str) -> str:
    """Returns a heading within a section."""
    return f"<h3>{html.escape(text)}</h3>"


def legend(colours: Mapping[str, str]) -> str:
    """Returns a legend of names and their colours."""
    entries = "".join(f'<span><i style="background:{c}"></i>{html.escape(name)}</span> ' for name, c in colours.items())
    return f'<div class="legend">{entries}</div>'


def captioned(caption: str, picture: str) -> str:
    """Returns a figure under a caption, which may be longer than a title within the figure could be."""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{picture}</figure>"


def grid(*parts: str) -> str:
    """Returns parts side by side if the screen is wide enough."""
    return '<div class="grid">' + "\n".join(parts) + "</div>"


def folded(title: str, *parts: str) -> str:
    """Returns parts that are hidden until the title is clicked."""
    return f"<details><summary>{html.escape(title)}</summary>" + "\n".join(parts) + "</details>"


def texts(named: Mapping[str, str]) -> str:
    """Returns a list of names and preformatted texts."""
    entries = (f"<dt>{html.escape(name)}</dt><dd><pre>{html.escape(text)}</pre></dd>" for name, text in named.items())
    return "<dl>" + "".join(entries) + "</dl>"


def section(title: str, *parts: str, grid: bool = False) -> str:
    """Returns a titled section of HTML parts; `grid` puts them side by side if the screen is wide enough."""
    body = "\n".join(parts)
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    start = f'<h2 id="{name}">{html.escape(title)}</h2>\n'
    return start + (f'<div class="grid">{body}</div>' if grid else body)


def write_page(out: Path, title: str, parts: Sequence[str], *, lead: Sequence[str] = ()) -> None:
    """Writes the page atomically: title, `lead`, links to the sections, sections.

    Raises:
        UserError: it cannot be written.
    """
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
    )
    body = "\n".join(parts)
    found = re.findall(r'<h2 id="([^"]*)">(.*?)</h2>', body)
    links = "<nav>" + "".join(f'<a href="#{name}">{text}</a>' for name, text in found) + "</nav>\n"
    first = "".join(f"{part}\n" for part in lead)
    write_output(out, f"{head}<body><h1>{html.escape(title)}</h1>\n{first}{links}{body}\n</body></html>\n")
