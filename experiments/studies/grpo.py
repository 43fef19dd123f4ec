"""`experiments.grpo` with the objectives of studies beside the published recipes.

python -m experiments.studies.grpo --recipe study_centered ...      # the flags of experiments.grpo
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import tyro

from experiments import grpo
from experiments.rl.config import Grpo
from experiments.studies.values import OWN
from purelm.align.recipe import Recipe
from purelm.align.recipes import RECIPES

__all__ = ["known", "main"]


@contextmanager
def known(recipes: Mapping[str, Recipe]) -> Iterator[None]:
    """Recipes are published ones, but within this: a run's process knows those of studies too."""
    if both := recipes.keys() & RECIPES.keys():
        raise ValueError(f"recipes: {', '.join(sorted(both))} are published ones")
    RECIPES.update(recipes)
    try:
        yield
    finally:
        for name in recipes:
            del RECIPES[name]


def main(cfg: Grpo) -> None:
    """The run."""
    with known(OWN):
        grpo.main(cfg)


if __name__ == "__main__":
    main(tyro.cli(Grpo))
