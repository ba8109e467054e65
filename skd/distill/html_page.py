"""A self-contained HTML page and its pieces; whatever text goes in is escaped here."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

_STYLE = """
:root { color-scheme: light; }
body { max-width: 62rem; margin: 0 auto; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; padding-bottom: .2rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4; }
th { font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; }
figcaption, .note { font-size: .92rem; color: #444; }
pre { padding: .7rem; background: #f5f5f5; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.bars svg { display: block; width: 100%; height: 1.2rem; margin-bottom: .5rem; }
.key svg { width: .8rem; height: .8rem; margin-right: .3rem; }
.key span { display: inline-block; margin-right: 1.1rem; }
@page { margin: 15mm; }
@media print {
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  figure img { min-width: 0; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page, which loads nothing and runs nothing."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(sections)}</body>
</html>
"""


def bullets(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>\n" for sentence in sentences)
    return f"<ul>\n{items}</ul>\n" if items else ""


def section(title: str, *content: str) -> str:
    """A heading and what is below it; nothing where there is nothing."""
    text = "".join(content)
    return f"<section>\n<h2>{escape(title)}</h2>\n{text}</section>\n" if text else ""


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def table(columns: Sequence[str], rows: Iterable[Sequence], *, numbers: bool = True) -> str:
    """The first column is text, the others are numbers unless told otherwise."""
    kinds = ["", *([' class="number"' if numbers else ""] * (len(columns) - 1))]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, columns, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(str(cell))}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'


def pairs(values: Mapping) -> str:
    """A table of names and values."""
    if not values:
        return ""
    rows = "".join(
        f"<tr><th>{escape(str(key).replace('_', ' '))}</th><td>{escape(str(value))}</td></tr>\n"
        for key, value in values.items()
    )
    return f'<div class="wide"><table>\n<tbody>\n{rows}</tbody>\n</table></div>\n'


def bars(rows: Mapping[str, Mapping[str, float]], colours: Mapping[str, str]) -> str:
    """A bar per row, stacked of its parts in the order of ``colours``; the longest takes the whole width."""
    longest = max(sum(parts.values()) for parts in rows.values())
    drawn = "".join(f"<div>{escape(name)}</div>\n{_bar(name, parts, colours, longest)}" for name, parts in rows.items())
    used = [part for part in colours if any(parts.get(part) for parts in rows.values())]
    key = "".join(
        f'<span><svg viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="{colours[part]}"/></svg>'
        f"{escape(part)}</span>\n"
        for part in used
    )
    return f'<div class="bars">\n{drawn}</div>\n<div class="key">\n{key}</div>\n'


def _bar(name: str, parts: Mapping[str, float], colours: Mapping[str, str], longest: float) -> str:
    x, boxes = 0.0, []
    for part, colour in colours.items():
        width = 1000 * parts.get(part, 0) / longest
        if width > 0:
            boxes.append(f'<rect x="{x:.2f}" y="0" width="{width:.2f}" height="10" fill="{colour}"/>')
        x += width
    return (
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{escape(name)}">'
        f"{''.join(boxes)}</svg>\n"
    )


def picture(path: Path, alt: str, captions: Sequence[str]) -> str:
    """A PNG with paragraphs below it; nothing where there is no such file."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    said = "".join(f"<p>{escape(caption)}</p>\n" for caption in captions)
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="wide">{image}</div>\n<figcaption>{said}</figcaption></figure>\n'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>\n" if text else ""
