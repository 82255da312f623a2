"""HTML as values: text is escaped unless it is already `Html`, so no text of a run can become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from posttrain.report.svg import COLORS


class Html(str):
    """Markup; everything else is text."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """An element; `class_` gives the attribute `class`.

    >>> element("td", "1 < 2", element("b", "!"), class_="x")
    '<td class="x">1 &lt; 2<b>!</b></td>'
    """
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[str]) -> Html:
    """Children one after the other, texts escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> Html:
    """A table that scrolls sideways where the page is narrow; the first cell of a row is its heading."""
    lines = [element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest))
             for first, *rest in rows]
    top = element("thead", element("tr", *(element("th", cell, scope="col") for cell in head)))
    return element("div", element("table", top, element("tbody", *lines), class_=kind), class_="wide")


def section(title: str, *children: str) -> Html:
    """A part of the page under its heading."""
    return element("section", element("h2", title), *children)


def chip(color: int) -> Html:
    """A spot in one of the page's colours."""
    return element("i", class_=f"chip c{color % COLORS}")
