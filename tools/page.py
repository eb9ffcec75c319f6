"""One HTML file that holds pictures and what is to be said of them; it needs nothing beside it and no network."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a; --paper: #fbfbfa; --line: #d9d9d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a3a39e; --paper: #191918; --line: #3a3a38; }
}
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem; box-sizing: border-box; }
figcaption, li { color: var(--soft); max-width: 50rem; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; padding-right: 1.5rem; vertical-align: top; }
td { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        name: of its file, without the suffix.
        heading: what it shows.
        caption: how to read it.
        png: the file's content.
    """

    name: str
    heading: str
    caption: str
    png: bytes


def page(title: str, facts: Mapping[str, str], pictures: Sequence[Picture], left_out: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        title: its title.
        facts: what stands in the table at the top.
        pictures: in their order.
        left_out: headings of pictures that there are not, and why.
    """
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>\n" for key, value in facts.items())
    figures = "".join(map(_figure, pictures))
    missing = "".join(f"<li>{escape(heading)}: {escape(reason)}</li>\n" for heading, reason in left_out.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<table>\n{rows}</table>\n{figures}"
        + (f"<h2>Left out</h2>\n<ul>\n{missing}</ul>\n" if left_out else "")
        + "</body>\n</html>\n"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{escape(picture.heading)}</h2>\n<figure>\n"
        f'<img alt="{escape(picture.heading)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n"
    )
