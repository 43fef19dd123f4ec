"""A page of its own to browse the answers to a question set, 50 at a time.

The rows lie in the page as JSON in which no "<" is left, and the page's program shows them as text (textContent), so
nothing that a model or a data file says becomes markup. 14,042 rows of MMLU are one page of some 20 MB.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purelm import track
from purelm.evals.tasks import Example

__all__ = ["write_page"]

_PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>
<style>
body{{font-family:sans-serif;margin:1em}} table{{border-collapse:collapse}} th{{text-align:left}}
td,th{{vertical-align:top;white-space:pre-wrap;border-top:1px solid #ccc;padding:2px 8px}}
tr.wrong td{{background:#fee}} tr.unparsed td{{background:#ffc}}
</style>
<h1>{name}</h1><p>{figures}</p>{subjects}
<p><select id=kind><option value="">all</option>{kinds}</select>
<select id=subject><option value="">all subjects</option>{options}</select>
<input id=search type=search placeholder="text to find">
<button id=back>back</button> <span id=place></span> <button id=next>next</button></p>
<noscript>Needs JavaScript; the rows are in the JSON-lines file beside this page.</noscript>
<table><thead><tr><th>id<th>question<th>response<th>answer<th>gold</thead><tbody id=rows></tbody></table>
<script type="application/json" id=data>{data}</script>
<script>
const at = id => document.getElementById(id), all = JSON.parse(at("data").textContent), size = 50;
let first = 0, found = all;
function show() {{
  at("rows").replaceChildren(...found.slice(first, first + size).map(row => {{
    const tr = document.createElement("tr");
    tr.className = row.kind;
    for (const text of row.cells) tr.appendChild(document.createElement("td")).textContent = text;
    return tr;
  }}));
  at("place").textContent = found.length ? `${{first + 1}} to ${{Math.min(first + size, found.length)}} of ` +
    `${{found.length}}` : "none";
}}
function choose() {{
  const kind = at("kind").value, subject = at("subject").value, text = at("search").value.toLowerCase();
  found = all.filter(row => (!kind || row.kind === kind) && (!subject || row.subject === subject) &&
    (!text || row.cells.some(cell => cell.toLowerCase().includes(text))));
  first = 0;
  show();
}}
for (const id of ["kind", "subject", "search"]) at(id).addEventListener("input", choose);
at("back").addEventListener("click", () => {{ first = Math.max(first - size, 0); show(); }});
at("next").addEventListener("click", () => {{ if (first + size < found.length) first += size; show(); }});
show();
</script></html>
"""


def write_page(
    path: Path, name: str, examples: Sequence[Example], rows: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """The page of a set: its figures, those of its subjects, and its rows by kind, subject and text."""
    data = [
        {"kind": _kind(row), "subject": example.subject, "cells": [
            row["id"], _question(example), "\n---\n".join(row["responses"]),
            ", ".join("none" if answer is None else answer for answer in row.get("answers", ())), row["gold"],
        ]}
        for example, row in zip(examples, rows, strict=True)
    ]  # fmt: skip
    subjects = sorted({example.subject for example in examples} - {""})
    track.write_text(
        path,
        _PAGE.format(
            name=html.escape(name),
            figures=html.escape(", ".join(f"{k} {track.show(v)}" for k, v in summary.items() if k != "subjects")),
            subjects=_table(summary.get("subjects", {})),
            kinds="".join(f"<option>{kind}</option>" for kind in ("right", "wrong", "unparsed")),
            options="".join(f"<option>{html.escape(subject)}</option>" for subject in subjects),
            # Of what may end a script or begin a comment in it, every form begins with "<".
            data=json.dumps(data).replace("<", "\\u003c"),
        ),
    )


def _kind(row: dict[str, Any]) -> str:
    """Of the first sample."""
    if "right" not in row:
        return ""
    return "right" if row["right"][0] else "unparsed" if row["answers"][0] is None else "wrong"


def _question(example: Example) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip("ABCD", example.options, strict=False)]
    return "\n".join([example.question, *lines])


def _table(subjects: dict[str, dict[str, Any]]) -> str:
    if not subjects:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{x['n']}<td>{x['right']}<td>{100 * x['accuracy']:.1f} %</tr>"
        for name, x in subjects.items()
    )
    return (
        f"<details open><summary>{len(subjects)} subjects</summary>"
        f"<table><tr><th>subject<th>n<th>right<th>accuracy</tr>{rows}</table></details>"
    )
