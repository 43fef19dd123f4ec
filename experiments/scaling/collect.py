"""Write the completed experiments of a key as a list of runs, for experiments.scaling.fit.

    python -m experiments.scaling.collect runs.json --key 12345678
    python -m experiments.scaling.fit runs.json --out results/scaling
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

from experiments.console import program, say
from experiments.limits import Place, Text
from experiments.scaling.client import URL, Client, Failure, given_key
from experiments.scaling.count import Counting, count
from experiments.scaling.service.schemas import Completed, Experiment
from purelm.files import staging, sync


@dataclass(frozen=True)
class Args:
    """Completed experiments as runs."""

    out: tyro.conf.Positional[Place]
    """file for a JSON list of runs: parameters, tokens, loss, and more"""
    url: Text = URL
    key: Text = ""
    """default: PURELM_API_KEY of the environment, which other users of the machine cannot read"""
    embeddings: bool = False
    """count the vocabulary's matrices as parameters too"""


@program
def main(args: Args) -> None:
    client = Client(args.url, given_key(args.key))
    try:
        rows = runs_of(client.experiments(), embeddings=args.embeddings)
    except Failure as error:
        raise ValueError(f"{args.url}: {error}") from None
    with staging(args.out.parent) as staged:
        (staged / "runs.json").write_text(json.dumps(rows, indent=1) + "\n")
        sync(staged / "runs.json")
        (staged / "runs.json").replace(args.out)
    say(f"{args.out}: {len(rows)} completed runs, by the {client.backend} back end")


def runs_of(experiments: Iterable[Mapping[str, Any]], *, embeddings: bool = False) -> list[dict[str, Any]]:
    """Completed experiments as runs for experiments.scaling.fit: parameters, tokens, loss, and what else tells them.

    embeddings: count the vocabulary's matrices too. Kaplan's and Chinchilla's laws differ by that, so each row says it.
    """
    counting: Counting = "all" if embeddings else "blocks"
    rows = []
    for found in map(Experiment.model_validate, experiments):
        cfg, status = found.training_config, found.status
        if isinstance(status, Completed) and status.val_losses:
            rows.append({
                "experiment": found.experiment_id,
                "parameters": count(cfg.architecture_config, counting),
                "counting": counting,
                "tokens": cfg.total_train_tokens,
                "loss": status.val_losses[-1],
                "batch": cfg.train_batch_size,
                "lr": cfg.optimizer_config.lr_scheduler.peak_value,
                "seconds": status.used_runtime_seconds,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
