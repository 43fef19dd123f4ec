"""config.json of open weights and `Config`, in both directions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from purelm.models.config import Config, RopeScaling
from purelm.models.hf.families import FAMILIES, IGNORED, Family, family_of

__all__ = ["from_json", "to_json"]

LAYER_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields of a rope's entry in config.json -> fields of RopeScaling, for each rope_type.
SCALINGS: dict[str, tuple[str, dict[str, str]]] = {
    "linear": ("linear", {}),
    "dynamic": ("dynamic_ntk", {}),
    "llama3": ("llama3", {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}),
    "yarn": ("yarn", {name: name for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")}),
}


def from_json(given: Mapping[str, Any], what: str, ignore: Sequence[str] = ()) -> Config:
    """The Config of the contents of a config.json. Errors begin with `what`, the name of the file.

    ValueError names every field that is missing, and every field or value that is not known here and so could change
    the result. ignore: names of unknown fields that are to be passed over.
    """
    family = family_of(given.get("model_type"), what)
    known = {*family.fields, *family.only, *family.ignored, *IGNORED, *ignore}
    has_rope = family.fixed.get("position", "rope") == "rope"
    if has_rope:
        known |= {*LAYER_FIELDS, *ROPE_FIELDS}
    unknown = sorted(name for name, value in given.items() if name not in known and value not in (None, False))
    if unknown:
        raise ValueError(
            f"{what}: {', '.join(unknown)}: not known for model_type {family.model_type}; ignore=[...] passes over "
            "fields that do not change the result"
        )
    values = {**family.defaults, **given}
    missing = sorted(name for name in family.fields if name not in values)
    if missing:
        raise ValueError(f"{what}: lacks {', '.join(missing)}")
    wrong = [f"{name} {values[name]!r}" for name, allowed in family.only.items() if values[name] not in allowed]
    if wrong:
        raise ValueError(f"{what}: {', '.join(wrong)}: not supported for model_type {family.model_type}")
    fields = {ours: values[theirs] for theirs, ours in family.fields.items()}
    odd = [
        f"{theirs} {values[theirs]!r}" for theirs, ours in family.fields.items()
        if ours not in ("norm_eps", "tie_embeddings") and not _is_size(values[theirs], theirs in family.defaults)
    ]  # fmt: skip
    if odd:
        raise ValueError(f"{what}: {', '.join(odd)}: not a positive integer")
    # Sizes that follow from others are written out, so that what is saved and read again is equal.
    fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]
    if has_rope:
        fields["n_kv_heads"] = fields["n_kv_heads"] or fields["n_heads"]
        if fields["head_dim"] is None and fields["d_model"] % fields["n_heads"] == 0:
            fields["head_dim"] = fields["d_model"] // fields["n_heads"]
        windows = _windows(family, values, what)
        fields |= _ropes(values, windows, what)
        fields["window"] = _in_turn(windows)
    try:
        return Config(**fields, **family.fixed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None


def to_json(cfg: Config, model_type: str | None = None) -> dict[str, Any]:
    """The contents of a config.json; ValueError says what no family, or not the one that is named, has of cfg."""
    families = list(FAMILIES.values()) if model_type is None else [family_of(model_type, "save")]
    reasons = []
    for family in families:
        try:
            return _to_json(cfg, family)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"cfg has no form as a config.json: {'; '.join(reasons)}")


def _to_json(cfg: Config, family: Family) -> dict[str, Any]:
    fixed = {**dict.fromkeys(("rope_layout",), cfg.rope_layout), **family.fixed}
    found: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    found |= {theirs: getattr(cfg, ours) for theirs, ours in family.fields.items()}
    found |= {name: allowed[0] for name, allowed in family.only.items()}
    taken = {*family.fields.values(), *fixed}
    if fixed.get("position", "rope") == "rope":
        taken |= {"rope_theta", "rope_scaling", "window"}
        found |= _rope_fields(cfg, family)
        found["num_key_value_heads"], found["head_dim"] = cfg.kv_heads, cfg.head_width
    found["n_inner" if family.model_type == "gpt2" else "intermediate_size"] = cfg.ff_width
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    wanted = {**{n: d for n, d in defaults.items() if n not in taken}, **family.fixed}
    wanted.pop("rope_layout", None)  # the rows of the file are in the family's order, whatever cfg has
    odd = [f"{name} is {getattr(cfg, name)!r}" for name, value in wanted.items() if getattr(cfg, name) != value]
    if odd:
        raise ValueError(f"{family.model_type} has no form for {', '.join(odd)}")
    if family.model_type == "gpt2" and (cfg.n_kv_heads, cfg.head_dim) != (None, None):
        raise ValueError("gpt2 has no form for n_kv_heads or head_dim")
    return found


def _is_size(value: Any, may_be_absent: bool) -> bool:
    if value is None:
        return may_be_absent
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Windows: transformers counts the position itself, `Config.window` the keys before it.


def _windows(family: Family, values: Mapping[str, Any], what: str) -> list[int | None]:
    """The window of every layer."""
    n = values["num_hidden_layers"]
    size = values.get("sliding_window")
    if "use_sliding_window" in values and not values["use_sliding_window"]:
        size = None
    kinds = values.get("layer_types")
    if kinds is None and family.model_type == "olmo3":
        kinds = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(n)]
    if kinds is None and "use_sliding_window" in values:
        first = values.get("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    if kinds is None:
        kinds = ["sliding_attention" if family.model_type == "mistral" else "full_attention"] * n
    if len(kinds) != n or not {*kinds} <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{what}: layer_types must say full_attention or sliding_attention for each of {n} layers, got {kinds}"
        )
    if size is None and family.model_type not in ("mistral", "qwen2", "qwen3") and "sliding_attention" in kinds:
        raise ValueError(f"{what}: lacks sliding_window, the size of layer_types' sliding_attention")
    return [None if size is None or kind == "full_attention" else int(size) - 1 for kind in kinds]


def _in_turn(values: Sequence[Any]) -> Any:
    """One value if all are equal, else the shortest tuple that repeats to them."""
    n = len(values)
    period = next(p for p in range(1, n + 1) if all(values[i] == values[i % p] for i in range(n)))
    return values[0] if period == 1 else tuple(values[:period])


# Rotary embeddings: {"rope_theta": ..., "rope_scaling": {...}}, or since transformers 5 {"rope_parameters": {...}},
# where that may be one entry for each kind of layer.


def _ropes(values: Mapping[str, Any], windows: Sequence[int | None], what: str) -> dict[str, Any]:
    entry = values.get("rope_parameters")
    if entry is None:
        scaling = values.get("rope_scaling") or {}
        entry = {**scaling, "rope_theta": values.get("rope_theta", 10000.0)}
        if values["model_type"] == "olmo3" and scaling:  # its windowed layers are not scaled
            entry = {"full_attention": entry, "sliding_attention": {"rope_theta": entry["rope_theta"]}}
    by_kind = {"full_attention", "sliding_attention"} & {*entry}
    ropes = []
    for window in windows:
        kind = "full_attention" if window is None else "sliding_attention"
        ropes.append(_rope(entry[kind] if by_kind else entry, values, what))
    return {"rope_theta": _in_turn([t for t, _ in ropes]), "rope_scaling": _in_turn([s for _, s in ropes])}


def _rope(entry: Mapping[str, Any], values: Mapping[str, Any], what: str) -> tuple[float, RopeScaling | None]:
    kind = entry.get("rope_type", entry.get("type", "default"))
    theta = float(entry.get("rope_theta", values.get("rope_theta", 10000.0)))
    if kind == "default":
        return theta, None
    if kind not in SCALINGS:
        raise ValueError(f"{what}: rope_type {kind!r} is not supported; supported are {', '.join(SCALINGS)}")
    ours, names = SCALINGS[kind]
    known = {*names, "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
    unknown = sorted(name for name, value in entry.items() if name not in known and value is not None)
    if unknown:
        raise ValueError(f"{what}: {', '.join(unknown)}: not supported for rope_type {kind}")
    if entry.get("factor") is None:
        raise ValueError(f"{what}: lacks the factor of rope_type {kind}")
    length = values["max_position_embeddings"]
    if kind != "dynamic":  # transformers' dynamic form has no other length
        length = entry.get("original_max_position_embeddings") or length
    options = {names[name]: value for name, value in entry.items() if name in names and value is not None}
    return theta, RopeScaling(ours, float(entry["factor"]), None if kind == "linear" else int(length), **options)  # type: ignore[arg-type]


def _rope_fields(cfg: Config, family: Family) -> dict[str, Any]:
    """Windows and ropes of a config.json."""
    windows = [cfg.window_of(i) for i in range(cfg.n_layers)]
    ropes = [cfg.rope_of(i) for i in range(cfg.n_layers)]
    sizes = {w for w in windows if w is not None}
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    found: dict[str, Any] = {}
    if sizes:
        if len(sizes) > 1 or family.model_type in ("llama", "olmo2"):
            raise ValueError(f"{family.model_type} has no form for window {cfg.window}")
        if family.model_type == "mistral" and None in windows:
            raise ValueError("mistral has one window for all layers")
        found["sliding_window"] = max(sizes) + 1
    elif family.model_type == "mistral":
        found["sliding_window"] = None
    elif family.model_type == "olmo3":
        found["sliding_window"] = cfg.context_length
    if family.model_type in ("qwen2", "qwen3"):
        found |= {"use_sliding_window": bool(sizes), "layer_types": kinds}
        found["max_window_layers"] = next((i for i, k in enumerate(kinds) if k != "full_attention"), cfg.n_layers)
    if family.model_type == "olmo3":
        found["layer_types"] = kinds
        by_kind: dict[str, Any] = {}
        for kind, rope in zip(kinds, ropes, strict=True):
            if by_kind.setdefault(kind, rope) != rope:
                raise ValueError(f"olmo3 has no form for several ropes of layers of the kind {kind}")
        some = next(iter(by_kind.values()))
        ropes_of = {kind: by_kind.get(kind, some) for kind in ("full_attention", "sliding_attention")}
        entries = {kind: _entry(rope, cfg.context_length) for kind, rope in ropes_of.items()}
        return {**found, "rope_parameters": entries}
    if len({*ropes}) > 1:
        raise ValueError(f"{family.model_type} has one rope for all layers")
    # The older form, which every version of transformers reads.
    entry = _entry(ropes[0], cfg.context_length)
    found["rope_theta"] = entry.pop("rope_theta")
    return found if ropes[0][1] is None else {**found, "rope_scaling": entry}


def _entry(rope: tuple[float, RopeScaling | None], length: int) -> dict[str, Any]:
    """One rope of a config.json whose max_position_embeddings is `length`."""
    theta, scaling = rope
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    kind = next((kind for kind, (ours, _) in SCALINGS.items() if ours == scaling.kind), None)
    if kind is None:
        raise ValueError(f"no family has a form for rope_scaling of the kind {scaling.kind!r}")
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": scaling.factor}
    if kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = scaling.original_length
    elif kind == "dynamic" and scaling.original_length != length:
        raise ValueError(f"rope_type dynamic scales from context_length {length}, not {scaling.original_length}")
    options = {theirs: getattr(scaling, field) for theirs, field in SCALINGS[kind][1].items()}
    return found | {name: value for name, value in options.items() if value is not None}
