"""Write the completed experiments of a key as a list of runs, for experiments.scaling.fit.

    python -m experiments.scaling.collect runs.json --key 12345678
    python -m experiments.scaling.fit runs.json --out results/scaling
"""

import json
import os
from dataclasses import dataclass

import tyro

from experiments.console import program, say
from experiments.limits import Place, Text
from experiments.scaling.client import URL, Client, Failure, runs_of
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
    client = Client(args.url, args.key or os.environ.get("PURELM_API_KEY", ""))
    try:
        rows = runs_of(client.experiments(), embeddings=args.embeddings)
    except Failure as error:
        raise ValueError(f"{args.url}: {error}") from None
    with staging(args.out.parent) as staged:
        (staged / "runs.json").write_text(json.dumps(rows, indent=1) + "\n")
        sync(staged / "runs.json")
        (staged / "runs.json").replace(args.out)
    say(f"{args.out}: {len(rows)} completed runs, by the {client.backend} back end")


if __name__ == "__main__":
    main(tyro.cli(Args))
