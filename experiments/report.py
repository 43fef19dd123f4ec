"""The end of a run: its summary, curves.png, report.html and summary.json, made from metrics.jsonl."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.config import Pretrain, config_json
from purelm import accounting, track
from purelm.evals import Score
from purelm.models import transformer
from purelm.train import TrainState


class Result(NamedTuple):
    """What a finished run reports."""

    state: TrainState
    score: Score | None
    seconds: float
    tokens: int


def summarise(cfg: Pretrain, model: transformer.Config, result: Result) -> dict[str, Any]:
    """Final figures of the run, for the terminal and the report."""
    out: dict[str, Any] = {
        "parameters": accounting.n_params(model),
        "steps": cfg.steps,
        "tokens": cfg.steps * cfg.batch_size * model.context_length,
        "seconds of training": round(result.seconds, 1),
    }
    if result.score is not None:
        out["held-out loss, nats per token"] = result.score.nats_per_token
        out["held-out perplexity"] = result.score.perplexity
        if result.score.n_bytes:
            out["held-out bits per byte"] = result.score.bits_per_byte
    return out


def finish(
    cfg: Pretrain,
    model: transformer.Config,
    summary: dict[str, Any],
    *,
    title: str,
    samples: Sequence[tuple[str, str]] = (),
    floor: float | None = None,
) -> None:
    """curves.png and report.html from metrics.jsonl, and the summary on the terminal."""
    curves = cfg.run / "curves.png"
    track.plot_curves(track.read_rows(cfg.run / "metrics.jsonl"), curves, floor=floor)
    config = config_json(cfg, model)
    track.write_report(
        cfg.run / "report.html", title=title, summary=summary, config=config, curves=curves, samples=samples
    )
    track.write_json(cfg.run / "summary.json", summary)
    for name, value in summary.items():
        print(f"{name:34} {track.show(value)}")
    for prompt, text in samples:
        print(f"\n--- {prompt!r}\n{text}")
    print(f"\n{cfg.run}: config.json, metrics.jsonl, curves.png, report.html, checkpoints/")
