"""Dependencies point one way, and private names stay in their package. Oracle: the syntax trees of all sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package or file of purelm may import of the others: some of those above it. "models.model" is that file
# alone. A new package gets a line here.
ARROWS = {
    "caches": "",
    "workers": "",
    "tree": "caches",
    "devices": "caches",
    "files": "",
    "track": "",
    "random": "tree devices",
    "transforms": "tree caches",
    "ops": "",
    "models": "tree random ops caches",  # never kernels: the caller passes a bundle of ops; for hf see BEYOND
    "optim": "tree transforms devices",
    "train": "tree transforms optim",
    "checkpoint": "tree files",
    "data": "random files caches",  # no model
    "tokenizer": "data files caches workers",  # no model
    "curate": "tree random optim data files tokenizer caches workers",  # no model
    "generate": "tree random ops devices transforms models.model models.tokens models.cache_rows",  # no model family
    "scaling": "random",  # no model: its runs are numbers
    "align": "tree random devices data workers caches",  # no model
    "evals": "tree random ops data tokenizer generate align models.model models.tokens",  # no model family
    "accounting": "tree models",
    "kernels": "tree transforms ops devices optim caches generate",  # optim for AdamW alone, generate for draw_
    "dist": "tree random transforms ops devices optim train checkpoint caches",  # works on a Model that it is given
    "interop": "tree optim dist",
    "testing": "tree random transforms ops models optim train data dist",
}
# What one part of a package may import beside these: nothing that imports the package.
BEYOND = {
    "purelm.models.hf": "files tokenizer",
    "purelm.models.gguf": "tokenizer",
    "purelm.scaling.mup": "models optim",  # of leaf tables and optimizers
}
PUBLIC = {"_replace", "_asdict", "_fields", "_make"}  # NamedTuple's, in spite of their names
FOLDERS = ("purelm", "purelm/kernels", "purelm/dist", "experiments")  # rglob does not walk into links
SOURCES = {p.relative_to(ROOT).with_suffix(""): p.read_text() for f in FOLDERS for p in (ROOT / f).rglob("*.py")}


def package(name):
    """purelm.ops for purelm.ops.rope; programs are one package."""
    parts = [part for part in name.split(".") if part != "__init__"]
    return ".".join(parts[: 1 if parts[0] == "experiments" else 2])


def imports(node):
    """(full dotted name, name in the file) of what is imported when the code runs, not for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        if isinstance(child, ast.Import):
            yield from ((a.name, a.asname or a.name) for a in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from ((f"{child.module}.{a.name}", a.asname or a.name) for a in child.names)
        yield from imports(child)


def from_elsewhere():
    """(module, its syntax tree, its imports from other packages of this project) of every source."""
    for path, text in SOURCES.items():
        module, tree = ".".join(path.parts), ast.parse(text)
        ours = [(x, here) for x, here in imports(tree) if x.split(".")[0] in ("purelm", "experiments")]
        yield module, tree, [(x, here) for x, here in ours if package(x) != package(module)]


def test_the_table_lists_every_package_once_and_points_upwards():
    packages = {package(".".join(path.parts)) for path in SOURCES}
    assert packages == {"purelm", "experiments", *(f"purelm.{name}" for name in ARROWS)}
    above = set()
    for name, allowed in ARROWS.items():
        assert {x.split(".")[0] for x in allowed.split()} <= above, f"{name} points down"
        above.add(name)


@pytest.mark.parametrize("name", ["", *ARROWS])  # "": purelm/__init__.py. Programs may import everything
def test_arrows(name):
    allowed = tuple(f"purelm.{x}." for x in ARROWS.get(name, "").split())
    for module, _, found in from_elsewhere():
        if package(module) == f"purelm.{name}".rstrip("."):
            more = [x for part, extra in BEYOND.items() if f"{module}.".startswith(f"{part}.") for x in extra.split()]
            wrong = [x for x, _ in found if not f"{x}.".startswith((*allowed, *(f"purelm.{x}." for x in more)))]
            assert not wrong, f"{module} imports {', '.join(wrong)}; {name or 'purelm'} may import {ARROWS.get(name)!r}"


def test_no_private_name_crosses_a_package():
    for module, tree, found in from_elsewhere():
        wrong = [x for x, _ in found if "._" in x]
        theirs = tuple(f"{here}." for _, here in found)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                used = ast.unparse(node)
                if node.attr not in PUBLIC and used.startswith(theirs):
                    wrong.append(used)
        assert not wrong, f"{module} uses {', '.join(wrong)}"


def test_no_torch_nn_in_the_reference():
    """The reference is torch primitives alone; sdpa, which is a wrapper of one of torch.nn's, is not in it."""
    files = {path: text for path, text in SOURCES.items() if path.parts[:2] == ("purelm", "ops")}
    assert len(files) > 10
    for path, text in files.items():
        assert path.name == "sdpa" or "torch.nn" not in text, path
