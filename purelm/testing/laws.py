"""What every check of this package is made of: a table of named laws, run one by one, and one error for all that fail.

A law is a function that raises where it does not hold: AssertionError (by `require`, `assert_trees_equal`,
`assert_trees_close`) with a sentence that says what differs, or whatever the checked function raised itself.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from purelm import random, tree
from purelm.tree import Tree

__all__ = [
    "Law",
    "LawError",
    "assert_trees_close",
    "assert_trees_equal",
    "draw_like",
    "inner",
    "require",
    "run_laws",
    "unchanged",
    "without",
]

Law = Callable[..., None]


class LawError(AssertionError):
    """A checked function breaks one law or several.

    failures: name of the law -> what it raised: an AssertionError where a result was wrong, anything else where the
        checked function raised.
    """

    def __init__(self, check: str, failures: Mapping[str, Exception]) -> None:
        self.failures = dict(failures)
        super().__init__("\n".join(f"{check}: {law}: {_sentence(error)}" for law, error in failures.items()))


def _sentence(error: Exception) -> str:
    text = str(error).strip() or "(no message)"
    if isinstance(error, AssertionError):
        return text
    return f"raised {type(error).__name__}: {text.splitlines()[0]}"  # torch's own go on for pages


def run_laws(check: str, table: Mapping[str, Law], laws: Iterable[str] | None, *args: Any) -> None:
    """Calls law(*args) for each law of the table, or for those named in `laws` alone.

    LawError names all laws that failed; ValueError a name that is not in the table, and a list of no names.
    """
    if isinstance(laws, str):
        raise ValueError(f"{check}: laws must be a list of names, got the string {laws!r}; pass [{laws!r}]")
    names = tuple(table) if laws is None else tuple(laws)
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        given = ", ".join(map(str, unknown)) or "none"
        raise ValueError(f"{check}: laws must be some of {', '.join(table)}; got {given}")
    failures: dict[str, Exception] = {}
    for name in names:
        try:
            table[name](*args)
        except Exception as error:  # anything that a user's function may raise
            failures[name] = error
    if failures:
        raise LawError(check, failures) from next(iter(failures.values()))


def without(table: Iterable[str], *names: str) -> tuple[str, ...]:
    """The laws of a table but those named, for a check's argument `laws`; ValueError for a name that is not there.

    >>> without(("pure", "vmap", "jvp"), "vmap")
    ('pure', 'jvp')
    """
    laws = tuple(table)
    unknown = [name for name in names if name not in laws]
    if unknown:
        raise ValueError(f"without: no law is called {', '.join(unknown)}; there are {', '.join(laws)}")
    return tuple(law for law in laws if law not in names)


def require(condition: bool | Tensor, message: str) -> None:
    """AssertionError with the message unless the condition holds; unlike `assert`, also under python -O."""
    if not bool(condition):
        raise AssertionError(message)


def assert_trees_equal(found: Tree, expected: Tree, what: str = "the trees") -> None:
    """AssertionError, which names the path, unless structure, dtypes, shapes and all bits are equal; NaN equals NaN."""
    for path, a, b in _pairs(found, expected, what):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            same = torch.equal(a, b) or (
                _is_inexact(a)
                and torch.equal(a.isnan(), b.isnan())
                and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
            )
            if not same:  # no `require`: of equal trees there is no difference to word, nor of empty leaves
                raise AssertionError(f"{what} differ{path}: {_differences(a, b)}")
        else:
            require(type(a) is type(b) and a == b, f"{what} differ{path}: {a!r} and not {b!r}")


def assert_trees_close(
    found: Tree, expected: Tree, what: str = "the trees", *, rtol: float | None = None, atol: float | None = None
) -> None:
    """AssertionError, which names the path, unless structure and dtypes are equal and values within the tolerances.

    The tolerances are those of torch.testing.assert_close: |found - expected| <= atol + rtol |expected|, by default
    according to the dtype; give both or neither.
    """
    for path, a, b in _pairs(found, expected, what):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            try:
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)
            except AssertionError as error:
                raise AssertionError(f"{what} differ{path}: {' '.join(str(error).split())}") from None
        else:
            require(type(a) is type(b) and a == b, f"{what} differ{path}: {a!r} and not {b!r}")


def _pairs(found: Tree, expected: Tree, what: str) -> Iterator[tuple[str, Any, Any]]:
    a, b = tree.structure(found), tree.structure(expected)
    require(a == b, f"{what} differ in structure: {a} and not {b}")
    for path, x, y in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        at = f" at {path}" if path else ""
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            require(
                x.shape == y.shape and x.dtype == y.dtype,
                f"{what} differ{at}: {tuple(x.shape)} {x.dtype} and not {tuple(y.shape)} {y.dtype}",
            )
        yield at, x, y


def _is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _differences(a: Tensor, b: Tensor) -> str:
    wrong = (a != b) & ~((a != a) & (b != b))
    if not _is_inexact(a):
        return f"{int(wrong.sum())} of {wrong.numel()} elements"
    largest = (a.double() - b.double()).abs().max()
    return f"{int(wrong.sum())} of {wrong.numel()} elements, by {float(largest):.3g} at most"


def draw_like(like: Tree, seed: int = 0) -> Tree:
    """The tree with standard normal values in place of its floating leaves, in their dtypes and on their devices."""
    leaves, form = tree.flatten(like)
    key = random.key(seed)

    def drawn(i: int, x: Any) -> Any:
        if not tree.is_floating(x):
            return x
        return random.normal(random.fold_in(key, i), tuple(x.shape), dtype=torch.float64).to(x.device, x.dtype)

    return tree.unflatten(form, [drawn(i, x) for i, x in enumerate(leaves)])


def inner(a: Tree, b: Tree) -> Tensor:
    """<a, b>: the sum over all floating leaves of the elementwise product, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True):
        if tree.is_floating(x):
            total = total + (x.to(torch.float64) * y.to(torch.float64)).sum().cpu()
    return total


@contextlib.contextmanager
def unchanged(*args: Tree) -> Iterator[None]:
    """AssertionError if the body wrote to a tensor of args, changed a dict or list of them, or drew from torch's global
    generators (CPU, and CUDA where it is in use).

    A write of the same value counts: it is seen by the tensor's version. A write through .data is seen by its bits.
    """
    leaves, form = tree.flatten(args)
    paths = tree.paths(args)
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
    versions = [_version(x) for x in leaves]
    generators = _generators()
    yield
    require(tree.structure(args) == form, f"an argument's structure changed: {tree.structure(args)} and not {form}")
    now = tree.leaves(args)
    for path, x, y, old, version in zip(paths, leaves, now, before, versions, strict=True):
        require(x is y, f"argument {path}: another object stands in its place")
        if isinstance(x, Tensor):
            same = _version(x) == version and x.dtype == old.dtype and x.shape == old.shape
            # As bytes, so that NaN equals NaN and -0 is not 0.
            same = same and torch.equal(tree.as_bytes(x), tree.as_bytes(old))
            require(same, f"argument {path} was written to")
    for name, state in _generators().items():
        require(name not in generators or torch.equal(state, generators[name]), f"{name} global generator was used")


def _version(x: Any) -> int | None:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _generators() -> dict[str, Tensor]:
    """States of torch's global generators, by whose."""
    states = {"torch's": torch.random.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["CUDA's"] = torch.cuda.get_rng_state()
    return states
