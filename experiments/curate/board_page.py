"""The table of `experiments.curate.board` as Markdown: a section for rows that compare with one another."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["render"]


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A section for each (size, version, tokenizer, reference texts), in the order of their first rows; best first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        key = json.dumps([row[x] for x in ("size", "version", "tokenizer", "reference")], sort_keys=True)
        groups.setdefault(key, []).append(row)
    parts = ["# Bits per byte of clean text after training on each data set", ""]
    for group in groups.values():
        parts += [*_section(group), ""]
    return "\n".join(parts)


def _section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first = rows[0]
    names = list(first["reference"])
    texts = ", ".join(f"{x} ({first['reference_counts'][x]['bytes']:,} bytes)" for x in names)
    head = ["data", "mean", *names, "tokens", "epochs", "seeds", "largest share of a reference in the tokens"]
    lines = [
        f"## Size {first['size']}, version {first['version']}", "",
        f"{first['parameters']:,} parameters, {first['budget']:,} tokens of training; tokenizer "
        f"{first['tokenizer'][:12]}; reference texts: {_cell(texts)}. Mean and standard deviation over seeds; less is "
        "better.", "",
        "| " + " | ".join(map(_cell, head)) + " |", "|---" * len(head) + "|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda row: row["mean"]["mean"]):
        cells = [
            row["name"], _figure(row["mean"]), *(_figure(row["bits_per_byte"][x]) for x in names),
            f"{row['n_tokens']:,}", f"{row['epochs']:.2f}", str(len(row["seeds"])),
            f"{100 * max(row['shared'].values()):.3f} %",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return lines


def _figure(spread: Mapping[str, Any]) -> str:
    return f"{spread['mean']:.4f}" + ("" if spread["sd"] is None else f" +- {spread['sd']:.4f}")


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
