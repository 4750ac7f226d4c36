"""Reports of what was measured: one HTML file for the browser, and its tables as Markdown for the terminal.

The HTML has no scripts and refers to nothing outside itself; the figures are embedded as PNG.
"""

import base64
import html
import os
import re
from collections.abc import Mapping, Sequence

from rbf_jax.files import replacing
from rbf_jax.plots import Figure, png

_MOST_WITHOUT_CONTENTS = 4
_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --shade: #f3f3f3; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --shade: #222; } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--shade); }
td:first-child, th:first-child { position: sticky; left: 0; min-width: 9rem; }
td:first-child { background: Canvas; }
.number { text-align: right; white-space: nowrap; }
nav ul { columns: 20rem; padding-left: 1.2rem; }
img { max-width: max(100%, 40rem); height: auto; background: #fff; border-radius: 4px; }
"""


def slug(title: str) -> str:
    """A title as part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def format_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """The table as Markdown whose columns also line up in a terminal.

    Args:
        columns: the headings, in order.
        rows: for each row the cells by heading; floats are shortened to 4 digits, None is a dash.

    Raises:
        ValueError: no columns, or a row whose headings are not the columns.
    """
    # A bar or a line break inside a cell would end it.
    escape = str.maketrans({"|": r"\|", "\n": " "})
    lines = [[text.translate(escape) for text in line] for line in [list(columns), *_cells(columns, rows)]]
    right = _number_columns(lines)
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def join(line: Sequence[str]) -> str:
        cells = zip(line, widths, right, strict=True)
        return "| " + " | ".join(text.rjust(n) if number else text.ljust(n) for text, n, number in cells) + " |"

    rule = ["-" * (n - 1) + ":" if number else "-" * n for n, number in zip(widths, right, strict=True)]
    return "\n".join([join(lines[0]), join(rule), *map(join, lines[1:])])


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    tables: Sequence[tuple[str, str, Sequence[Mapping[str, object]]]],
    sections: Sequence[tuple[str, str, Figure, str]],
) -> None:
    """Writes the report, with a table of contents where it is long; never leaves half a file.

    Args:
        path: the HTML file.
        title: heading of the report.
        summary: what was found; an empty line starts a new paragraph, here and in the explanations.
        tables: (heading, explanation, rows with the same headings, in the first row's order); cells as in
            `format_table`.
        sections: (heading, explanation, figure, what the figure shows for those who cannot see it).

    Raises:
        ValueError: an empty table, rows with other headings than the first, or a figure without description.
    """
    contents = []
    for heading, text, rows in tables:
        if not rows:
            raise ValueError(f"the table of section {heading!r} must have at least one row, got {rows!r}")
        contents.append((heading, text, _html_table(list(rows[0]), rows)))
    for heading, text, figure, alt in sections:
        if not alt.strip():
            raise ValueError(f"the figure of section {heading!r} needs a description, got {alt!r}")
        data, width = base64.b64encode(png(figure)).decode(), round(96 * figure.get_figwidth())
        image = f'<img src="data:image/png;base64,{data}" width="{width}" alt="{html.escape(alt)}">'
        contents.append((heading, text, f'<div class="wide">{image}</div>'))
    parts = [f"<h1>{html.escape(title)}</h1>", _paragraphs(summary)]
    headings = [html.escape(heading) for heading, _, _ in contents]
    if len(headings) > _MOST_WITHOUT_CONTENTS:
        items = [f'<li><a href="#section-{i}">{heading}</a></li>' for i, heading in enumerate(headings, 1)]
        parts += ['<nav aria-label="Contents">', "<ul>", *items, "</ul>", "</nav>"]
    for i, (heading, (_, text, body)) in enumerate(zip(headings, contents, strict=True), 1):
        parts += [f'<h2 id="section-{i}">{heading}</h2>', _paragraphs(text), body]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"\n<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>"
    body = "\n".join(parts)
    page = f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _cells(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[list[str]]:
    if not columns:
        raise ValueError(f"columns must name at least one column, got {columns!r}")
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"every row must have the columns {list(columns)}, got {list(row)}")
    return [[_text(row[column]) for column in columns] for row in rows]


def _text(value: object) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _number_columns(lines: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold nothing but numbers and gaps, below the headings: they are set flush right."""
    columns = [[text for text in column[1:] if text not in ("", "–")] for column in zip(*lines, strict=True)]
    return [bool(column) and all(text.lstrip("+-−")[:1].isdigit() for text in column) for column in columns]


def _paragraphs(text: str) -> str:
    return "\n".join(f"<p>{html.escape(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _html_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    lines = [list(columns), *_cells(columns, rows)]
    classes = [' class="number"' if number else "" for number in _number_columns(lines)]
    out = []
    for line, tag in zip(lines, ["th", *["td"] * len(rows)], strict=True):
        cells = zip(line, classes, strict=True)
        out.append("<tr>" + "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(out) + "\n</table></div>"
