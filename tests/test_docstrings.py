"""Every public definition of purelm, kernels and dist has a docstring. Oracle: the syntax trees of the files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path
    for folder in ("purelm", "kernels", "dist")
    for path in (ROOT / folder).rglob("*.py")
    if not (ROOT / "purelm/kernels" in path.parents or ROOT / "purelm/dist" in path.parents)  # links to the folders
)
# Methods of a torch.autograd.Function: torch calls and documents them, and the class says what is computed.
OF_FUNCTION = {"forward", "backward", "setup_context", "vmap", "jvp"}


def undocumented(node: ast.Module | ast.ClassDef, name: str) -> Iterator[str]:
    """Names of public definitions without a docstring, at `node` and inside it.

    Exempt are private names and their contents; definitions inside a function, which no other code can reach; and
    double-underscore methods, which Python documents (for a Protocol, the class says what its __call__ does).
    """
    if not ast.get_docstring(node):
        yield name
    methods = OF_FUNCTION if isinstance(node, ast.ClassDef) and is_autograd_function(node) else set()
    for child in definitions(node.body):
        if child.name.startswith("_") or child.name in methods:
            continue
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{name}.{child.name}")
        elif not ast.get_docstring(child):
            yield f"{name}.{child.name}"


def definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes of a body, also under `if` and `try`; of overloads only the implementation."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not any(ast.unparse(d).endswith("overload") for d in statement.decorator_list):
                yield statement
        elif isinstance(statement, ast.If | ast.Try):
            yield from definitions(statement.body)
            yield from definitions(statement.orelse)


def is_autograd_function(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).split(".")[-1] == "Function" for base in node.bases)


@pytest.mark.parametrize("folder", ["purelm", "kernels", "dist"])
def test_public_definitions_have_docstrings(folder):
    files = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    assert files
    missing = [
        name
        for path in files
        for name in undocumented(ast.parse(path.read_text()), str(path.relative_to(ROOT).with_suffix("")))
    ]
    assert not missing, f"no docstring: {', '.join(missing)}"


def test_what_is_exempt():
    source = '''"""Module."""
class Public:
    """Class."""
    def method(self): ...
    def __call__(self): ...
    @overload
    def spelled(self): ...
    def spelled(self): """Said once."""
class Op(torch.autograd.Function):
    """Op."""
    def forward(ctx): ...
    def helper(ctx): ...
def function():
    def inside(): ...
def _private(): ...
if x:
    def conditional(): ...
'''
    found = list(undocumented(ast.parse(source), "m"))
    assert found == ["m.Public.method", "m.Op.helper", "m.function", "m.conditional"]
