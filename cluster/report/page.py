"""A page of sections, as Markdown with pictures beside it and as one HTML file with them inside.

Knows no row: sections come ready. Nothing on the page is loaded from a network.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .22rem .6rem; border-bottom: 1px solid #d9dee3; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #9aa4ad; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: 13px; max-width: 60rem; }
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are texts already; every row has a cell for each column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"row {row}: expected a cell for each of {self.columns}")

    @staticmethod
    def of(cells: Sequence[Mapping[str, str | None]]) -> Table:
        """Columns of the first row, without those in which nobody has anything; None is "-"."""
        names = [name for name in cells[0] if any(row[name] is not None for row in cells)]
        rows = tuple(tuple("-" if row[n] is None else str(row[n]) for n in names) for row in cells)
        return Table(tuple(names), rows)


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG with a name for its file (letters, digits, "-") and what it shows, in words."""

    name: str
    svg: str
    caption: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise ValueError(f"name: got {self.name!r}, expected lower case letters, digits, '-'")


Part: TypeAlias = str | Table | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, in order; texts are paragraphs of plain words."""

    title: str
    parts: tuple[Part, ...] = field(default=())


def markdown(title: str, sections: Sequence[Section], pictures: str) -> str:
    """`pictures` is the folder of the SVG files, relative to the page."""
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Table):
                blocks.append(_markdown_table(part))
            elif isinstance(part, Picture):
                blocks.append(f"![{part.caption}]({pictures}/{part.name}.svg)\n\n*{part.caption}*")
            else:
                blocks.append(part)
    return "\n\n".join(blocks) + "\n"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """One file that stands alone."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [_html_part(part) for part in section.parts]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def write_page(folder: Path, name: str, title: str, sections: Sequence[Section]) -> list[Path]:
    """Write NAME.md, NAME.html and the pictures in the folder NAME; returns the two pages."""
    pictures = folder / name
    pictures.mkdir(parents=True, exist_ok=True)
    shown = [p for section in sections for p in section.parts if isinstance(p, Picture)]
    names = [picture.name for picture in shown]
    assert len(names) == len(set(names)), f"two pictures of one name: {sorted(names)}"
    for picture in shown:
        (pictures / f"{picture.name}.svg").write_text(picture.svg)
    pages = [folder / f"{name}.md", folder / f"{name}.html"]
    pages[0].write_text(markdown(title, sections, name))
    pages[1].write_text(html_page(title, sections))
    return pages


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    return "\n".join([line(table.columns), rule, *(line(row) for row in table.rows)])


def _html_part(part: Part) -> str:
    if isinstance(part, Table):
        head = "".join(f"<th>{html.escape(name)}</th>" for name in part.columns)
        rows = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in part.rows
        )
        return (
            f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody></table></div>"
        )
    if isinstance(part, Picture):
        caption = html.escape(part.caption)
        return f"<figure>{inline(part)}<figcaption>{caption}</figcaption></figure>"
    return f"<p>{html.escape(part)}</p>"


def inline(picture: Picture) -> str:
    """The SVG element alone, its ids its own on a page of several."""
    svg = picture.svg[picture.svg.index("<svg") :].strip()
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{picture.name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{picture.name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{picture.name}-\1"', svg)
    label = html.escape(picture.caption, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
