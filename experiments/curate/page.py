"""OUT/report.html: one page without links to other files; what documents say is shown as text, never as markup."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.console import clock
from experiments.curate.config import Cost, Curate
from experiments.curate.plan import Input
from purelm import track

__all__ = ["estimate", "page", "write_page"]

STYLE = """
body{font-family:sans-serif;margin:1em;max-width:75em} table{border-collapse:collapse} th{text-align:left}
td,th{vertical-align:top;border-top:1px solid #ccc;padding:2px 8px} td.n{text-align:right}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:4px;max-height:14em;overflow:auto}
.bar{background:#69c;height:0.8em}
"""
FILES = (5_000, 100_000)  # of the estimate


def write_page(cfg: Curate, inputs: Sequence[Input], counts: Mapping[str, Any]) -> None:
    """The page, from exact counts and the times in OUT/timing."""
    times = [
        {"stage": path.name.rpartition("-")[0], **json.loads(path.read_text())}
        for path in sorted((cfg.output / "timing").glob("*.json"))
    ]
    track.write_text(cfg.output / "report.html", page(cfg, inputs, counts, times))


def page(cfg: Curate, inputs: Sequence[Input], counts: Mapping[str, Any], times: Sequence[Mapping[str, Any]]) -> str:
    """The page as text."""
    duplicates = counts["duplicates"]
    final = [sum(x[key] for x in counts["text"]) for key in ("documents", "characters")]
    name = _text(cfg.output.name)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>",
        f"<p>{len(inputs):,} inputs, {sum(x.size for x in inputs) / 1e6:,.1f} MB as stored; at the end {final[0]:,} "
        f"documents with {final[1]:,} characters"
        + (f", {sum(counts['tokens']):,} tokens" if counts["tokens"] else "") + ".</p>",
        "<h2>Documents by step</h2>", _funnel(counts, final),
        "<h2>Why documents were dropped</h2>", _reasons(counts), _looked_for(counts),
        "<h2>Read</h2>", _read(counts),
        "<h2>Languages</h2>", _bars("language", sorted(counts["languages"].items(), key=_most)[:30]),
        "<h2>Lengths of documents kept by the steps, characters</h2>",
        _bars("at least", sorted(counts["lengths"].items(), key=lambda item: int(item[0]))),
        "<h2>Domains with the most documents kept by the steps</h2>", _bars("domain", counts["domains"]),
        "<h2>Masked</h2>", _bars("kind", counts["masked"].items()),
        "<h2>Duplicates</h2>", _duplicates(duplicates, cfg.excerpt),
        "<h2>Speed and cost</h2>", _speed(cfg, times),
        "<h2>Random documents</h2>", _examples(counts["examples"], cfg.excerpt),
        "<h2>Settings</h2>", f"<pre>{_text(cfg)}</pre></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def estimate(times: Iterable[Mapping[str, Any]], cost: Cost, n_files: int) -> tuple[float, float] | None:
    """(core hours, dollars) of n_files of cost.file_megabytes: CPU seconds here by bytes as stored, times theirs.

    None where nothing was measured.
    """
    times = list(times)
    cpu, stored = sum(x["cpu_seconds"] for x in times), sum(x["stored_bytes"] for x in times)
    if not stored:
        return None
    hours = cpu / stored * cost.file_megabytes * 1e6 * n_files / 3600
    return hours, hours * cost.dollars


def _text(value: Any) -> str:
    return html.escape(str(value))


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers with commas and to the right; a string that begins with <div is a bar of `_bar`, all others are text."""
    lines = ["<table><tr>" + "".join(f"<th>{_text(x)}" for x in head) + "</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(_cell(x) for x in row) + "</tr>")
    return "\n".join((*lines, "</table>"))


class _Bar(float):
    """A share, shown as a bar."""


def _cell(value: Any) -> str:
    if isinstance(value, _Bar):
        return f'<td><div class=bar style="width:{200 * value:.0f}px"></div>'
    if isinstance(value, float):
        return f"<td class=n>{value:,.4g}" if value < 100 else f"<td class=n>{value:,.0f}"
    return f"<td class=n>{value:,}" if isinstance(value, int) else f"<td>{_text(value)}"


def _bars(name: str, items: Iterable[Sequence[Any]]) -> str:
    items = list(items)
    most = max((n for _, n in items), default=1)
    return _table((name, "documents", ""), ((_text_or(x), n, _Bar(n / most)) for x, n in items))


def _text_or(name: str) -> str:
    return name or "(none)"


def _funnel(counts: Mapping[str, Any], final: Sequence[int]) -> str:
    rows: list[Sequence[Any]] = []
    records, duplicates = counts["read"]["records"], counts["duplicates"]
    rows.append(("read", records, records, counts["read"]["size"], counts["read"]["size"], _Bar(1.0)))
    for step, row in counts["funnel"].items():
        share = _Bar(row["kept"] / records if records else 0)
        rows.append((step, row["documents"], row["kept"], row["characters"], row["kept_characters"], share))
    n, left = duplicates["documents"], duplicates["documents"] - duplicates["exact"]
    rows.append(("exact duplicates", n, left, "", "", _Bar(left / max(records, 1))))
    rows.append(("near duplicates", left, final[0], "", final[1], _Bar(final[0] / max(records, 1))))
    head = ("step", "documents in", "kept", "characters in (of pages: bytes)", "kept", "share of all records")
    return _table(head, rows)


def _reasons(counts: Mapping[str, Any]) -> str:
    rows = [
        (step, reason, n, _Bar(n / row["documents"]))
        for step, row in counts["funnel"].items()
        for reason, n in sorted(row["dropped"].items(), key=_most)
    ]
    return _table(("step", "reason", "documents", "share of those that reached the step"), rows)


def _looked_for(counts: Mapping[str, Any]) -> str:
    texts = counts.get("evaluation texts")
    if texts is None:
        return ""
    return (f"<p>Decontamination looked for {texts['looked for']:,} evaluation texts; {texts['too short']:,} more are "
            "too short to be looked for.</p>")  # fmt: skip


def _read(counts: Mapping[str, Any]) -> str:
    skipped = sorted(counts["read"]["skipped"].items(), key=_most)
    table = _table(("skipped", "records"), skipped)
    places = "".join(f"<li>{_text(place)}" for place in counts["places"])
    damage = f"<p>Damage, the first places:</p><ul>{places}</ul>" if places else ""
    return f"<p>{counts['read']['records']:,} records read.</p>{table}{damage}"


def _duplicates(found: Mapping[str, Any], most: int) -> str:
    parts = [
        f"<p>{found['exact']:,} exact and {found['near']:,} near duplicates of {found['documents']:,} documents; the "
        "first of each cluster is kept.</p>",
        _table(("documents in a cluster", "clusters"), ((size, n) for size, n in found["clusters"].items())),
    ]
    for cluster in found["largest"]:
        members = "".join(_document(x, most) for x in cluster["members"])
        parts.append(f"<details><summary>a cluster of {cluster['documents']:,}</summary>{members}</details>")
    return "\n".join(parts)


def _speed(cfg: Curate, times: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for stage in dict.fromkeys(x["stage"] for x in times):
        mine = [x for x in times if x["stage"] == stage]
        cpu, n_bytes = sum(x["cpu_seconds"] for x in mine), sum(x["bytes"] for x in mine)
        documents, peak = sum(x["documents"] for x in mine), max(x["peak_bytes"] for x in mine)
        seconds = sum(x["seconds"] for x in mine)
        rates = (documents / max(cpu, 1e-9), n_bytes / max(cpu, 1e-9) / 1e6)
        rows.append((stage, len(mine), clock(seconds), clock(cpu), *rates, peak / 1e6))
    head = ("stage", "parts", "time of all workers", "CPU time", "documents/s of CPU time", "MB/s of CPU time",
            "peak memory of a worker, MB")  # fmt: skip
    lines = [_table(head, rows)]
    costs = []
    for n in FILES:
        found = estimate(times, cfg.cost, n)
        if found is not None:
            costs.append((n, found[0], found[1]))
    lines.append(
        f"<p>Estimate at this rate, for files of {cfg.cost.file_megabytes:g} MB as stored and {cfg.cost.dollars:g} "
        "dollars for a core and hour. It holds for files like these inputs: WARC takes longer than WET.</p>"
    )
    lines.append(_table(("files", "core hours", "dollars"), costs))
    return "\n".join(lines)


def _examples(examples: Mapping[str, Sequence[Mapping[str, Any]]], most: int) -> str:
    parts = []
    for kind, shown in sorted(examples.items(), key=lambda item: (item[0] != "kept", item[0])):
        inner = "".join(_document(x, most) for x in shown)
        parts.append(f"<details><summary>{_text(kind)}</summary>{inner}</details>")
    return "\n".join(parts)


def _document(shown: Mapping[str, Any], most: int) -> str:
    """most: characters of its text."""
    value = shown.get("value")
    measured = "" if value is None else f" ({_text(value)})"
    return f"<p>{_text(shown['url'] or shown['id'])}{measured}</p><pre>{_text(shown['text'][:most])}</pre>"
