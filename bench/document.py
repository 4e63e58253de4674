"""A document as a list of blocks, written as Markdown or as one HTML page that loads nothing.

Text may hold `code` and *~predicted* (an asterisk, a tilde): nothing else is markup, because reasons
and error messages from a run are shown as they came.
"""

import base64
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --page: #ffffff; --line: #d0d7de;
        --head: #f3f5f7; --alert: #b3261e; --alert-page: #fdecea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --dim: #a0a8b2; --page: #14171b; --line: #3a4149; --head: #1f242a;
          --alert: #ffb4ab; --alert-page: #3b1513; } }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink); background: var(--page);
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
p, li, figcaption { max-width: 50rem; }
h1, h2, h3 { line-height: 1.25; margin: 2em 0 0.5em; }
h1 { margin-top: 0.5em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3em 0.7em; border: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--head); }
th:first-child, td:first-child, .words { text-align: left; }
.words { white-space: normal; min-width: 9rem; }
em { color: var(--dim); }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; background: #ffffff; border-radius: 4px; }
figcaption { color: var(--dim); margin-top: 0.4rem; }
.alert { border: 2px solid var(--alert); background: var(--alert-page); padding: 0.5rem 1rem; }
.alert strong { color: var(--alert); }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self) -> str:
        return f"<h{self.level}>{inline(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    text: str

    def markdown(self) -> str:
        return self.text

    def html(self) -> str:
        return f"<p>{inline(self.text)}</p>"


@dataclass(frozen=True)
class Bullets:
    items: list[str]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def html(self) -> str:
        return f"<ul>{''.join(f'<li>{inline(item)}</li>' for item in self.items)}</ul>"


@dataclass(frozen=True)
class Alert:
    """What a reader must not miss."""

    title: str
    items: list[str]

    def markdown(self) -> str:
        return "\n".join([f"> **{self.title}**", ">", *(f"> - {item}" for item in self.items)])

    def html(self) -> str:
        title = f"<strong>{inline(self.title)}</strong>"
        return f'<div class="alert" role="alert">{title}{Bullets(self.items).html()}</div>'


@dataclass(frozen=True)
class Table:
    """Cells are text; columns in `words` hold words: they stand on the left and may wrap."""

    header: list[str]
    rows: list[list[str]]
    words: set[str] = field(default_factory=set)

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    def html(self) -> str:
        kinds = [' class="words"' if name in self.words else "" for name in self.header]
        names = zip(kinds, self.header, strict=True)
        head = "".join(f"<th{kind}>{inline(name)}</th>" for kind, name in names)
        body = "".join(
            f"<tr>{''.join(f'<td{k}>{inline(c)}</td>' for k, c in zip(kinds, row, strict=True))}</tr>"
            for row in self.rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="scroll" tabindex="0">{table}</div>'


@dataclass(frozen=True)
class Picture:
    """A PNG, linked as `figures/NAME` from Markdown and embedded in HTML."""

    path: Path
    title: str
    caption: str

    def markdown(self) -> str:
        return f"![{self.title}]({self.path.parent.name}/{self.path.name})\n\n{self.caption}"

    def html(self) -> str:
        png = self.path.read_bytes()
        width = int.from_bytes(png[16:20], "big")  # PNG header; its text is legible at these sizes
        style = f"min-width: {width / 2.8:.0f}px; max-width: {width / 1.6:.0f}px"
        data = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = f'<img alt="{html.escape(self.title)}" style="{style}" src="{data}">'
        caption = f"<figcaption>{inline(self.caption)}</figcaption>"
        return f'<figure><div class="scroll" tabindex="0">{image}</div>{caption}</figure>'


Block = Heading | Text | Bullets | Alert | Table | Picture


def inline(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"\*(~[^*]*)\*", r"<em>\1</em>", text)
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", text)


def to_markdown(blocks: list[Block]) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def to_html(title: str, blocks: list[Block]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style>"
    )
    body = "\n".join(block.html() for block in blocks)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
