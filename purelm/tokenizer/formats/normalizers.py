"""The normalizers of a tokenizer.json as one Unicode normal form: NFC, NFD, NFKC, NFKD and Sequences of them.

Several in a row are one: compatible (K) if any is, composed or decomposed as the last is (Unicode Standard Annex 15,
section 1.3: the forms keep canonical equivalence, and K cannot be undone).
"""

from typing import Any

from purelm.tokenizer.bpe import FORMS


def normalizer_to_json(form: str | None) -> dict[str, Any] | None:
    """The normalizer of a normal form."""
    return None if form is None else {"type": form}


def normalizer_from_json(normalizer: Any, problems: list[str]) -> str | None:
    """The normal form of a normalizer; what is not supported is added to `problems`."""
    form: str | None = None
    for step in _flat(normalizer):
        kind = step.get("type") if isinstance(step, dict) else "damaged"
        if kind not in FORMS:
            problems.append(f"the normalizer {kind} changes the text; supported are {', '.join(FORMS)}")
            continue
        for key in sorted(set(step) - {"type"}):
            problems.append(f"the normalizer {kind} has {key} {step[key]!r}, which is not known")
        compatible = "K" in kind or (form is not None and "K" in form)
        form = f"NF{'K' if compatible else ''}{kind[-1]}"
    return form


def _flat(normalizer: Any) -> list[Any]:
    if normalizer is None:
        return []
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
        return [one for step in steps for one in _flat(step)] if isinstance(steps, list) else ["damaged"]
    return [normalizer]
