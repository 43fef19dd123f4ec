"""The settings that answers were given under, beside them: others are not mixed with these."""

import json
from collections.abc import Collection
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from purelm import track

__all__ = ["keep_settings"]


def keep_settings(folder: Path, args: Any, free: Collection[str], **of_contents: str) -> None:
    """Write settings.json, a program's arguments and what its inputs hold; ValueError if it has others.

    free: arguments that may differ; of_contents: fingerprints of the inputs, by name.
    """
    path = folder / "settings.json"
    settings = {name: str(value) for name, value in asdict(args).items() if name not in free} | of_contents
    if path.is_file():
        # A setting that is not in the file was not there yet, and had no effect.
        before = {x.name: str(x.default) for x in fields(args) if x.default is not MISSING}
        before |= json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} ({before.get(name)})" for name in settings if before.get(name) != settings[name]]
        if changed:
            raise ValueError(f"{folder}: has answers with another {', '.join(changed)}: give another --out")
    track.write_json(path, settings)
