"""The recipes of purelm.align.recipes: a table of all, one of them, or what differs between two.

python -m experiments.recipes                    # all, in short
python -m experiments.recipes dapo               # every field, with the source
python -m experiments.recipes grpo dapo          # the fields in which they differ
python -m experiments.recipes --against olmo3    # how many fields of each recipe differ from this one's
"""

import difflib
from dataclasses import dataclass
from typing import Annotated

import tyro

from experiments.console import program
from purelm.align.recipes import RECIPES, Recipe, differences, fields_of

COLUMNS = ("advantage", "ratio", "region", "aggregate", "weight", "group_size", "prompts", "max_new_tokens",
           "minibatches", "lr")  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Which recipes to show."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """none: a table of all; one: all of its fields; two: where they differ"""
    against: str | None = None
    """a recipe to compare all others with"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * n for n in widths), *lines[1:]])


def recipe_named(name: str) -> Recipe:
    """ValueError with the nearest names for one that is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"; near are {', '.join(near)}" if near else ""
        raise ValueError(f"no recipe is called {name!r}{hint}; python -m experiments.recipes lists all")
    return RECIPES[name]


def overview() -> str:
    """A row for each recipe."""
    rows = [[name, *(fields_of(recipe)[column] for column in COLUMNS)] for name, recipe in RECIPES.items()]
    return table(["recipe", *COLUMNS], rows)


def one(name: str) -> str:
    """A row for each field that the recipe's source gives."""
    return table(["field", name], [[field, x] for field, x in fields_of(recipe_named(name)).items() if x != "-"])


def two(a: str, b: str) -> str:
    """A row for each field in which they differ."""
    rows = [[field, *pair] for field, pair in differences(recipe_named(a), recipe_named(b)).items()]
    return table(["field", a, b], rows) if rows else f"{a} and {b} do not differ"


def counted(name: str) -> str:
    """For each other recipe the names of the fields in which it differs from this one, fewest first."""
    mine = recipe_named(name)
    found = {other: list(differences(mine, recipe)) for other, recipe in RECIPES.items() if other != name}
    rows = [[other, str(len(x)), ", ".join(x)] for other, x in sorted(found.items(), key=lambda pair: len(pair[1]))]
    return table([f"against {name}", "differ", "fields"], rows)


@program
def main(args: Args) -> None:
    """Print what is asked for."""
    if len(args.names) > 2:
        raise ValueError(f"two recipes are compared at most, got {len(args.names)}: {', '.join(args.names)}")
    if args.against is not None:
        if args.names:
            raise ValueError("--against compares with all recipes; leave the names out, or give two names without it")
        print(counted(args.against))
    elif not args.names:
        print(overview())
    else:
        print(one(args.names[0]) if len(args.names) == 1 else two(*args.names))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
