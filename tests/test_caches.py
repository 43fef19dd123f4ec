"""Memo tables. Oracles: functools' own counters, for every table of every module; results before and after."""

import functools
import gc
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

import purelm
from purelm import caches, tree
from purelm.caches import clear_caches, memo, on_clear
from purelm.models import transformer
from purelm.tokenizer import encode, make

TABLE = type(functools.lru_cache(len))
# What is to happen once in a process, so that emptying it would be wrong.
NOT_EMPTIED = {
    "purelm.transforms.torch_versions.keep_writes_behind_reads",  # mends a function of torch: twice is once too often
    "purelm.kernels.flash_attention_tuned._say_once",  # a warning
}


def named(function):
    """module.name; of a partial function, which has none, that of what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


@pytest.fixture(scope="module")
def tables():
    """Every functools table of the library, by the name of the function that it keeps results of."""
    pytest.importorskip("numba")
    pytest.importorskip("triton")
    names = [module.name for module in pkgutil.walk_packages(purelm.__path__, "purelm.")]
    for folder in ("kernels", "dist"):  # which have no __init__.py, so pkgutil passes over them
        names += [f"purelm.{folder}.{path.stem}" for path in (Path(purelm.__path__[0]) / folder).glob("*.py")]
    for name in names:
        importlib.import_module(name)
    found = {named(x.__wrapped__): x for x in gc.get_objects() if type(x) is TABLE}
    return {name: x for name, x in found.items() if name.startswith("purelm.") and "<locals>" not in name}


def test_every_table_is_made_by_memo(tables):
    """A functools table in a module of the library is registered, or is one of those that must not be emptied."""
    assert {"purelm.models.layers._leaves", "purelm.tree.walks._paths_of", "purelm.dist.fsdp_parts._asks"} <= {*tables}
    registered = {clear.__self__ for clear in caches._CLEARS if inspect.isbuiltin(clear)}
    assert {name for name, table in tables.items() if table not in registered} == NOT_EMPTIED


def some_results():
    cfg = transformer.Config(vocab_size=16, context_length=8, d_model=8, n_layers=2, n_heads=2)
    model = transformer.make(cfg)
    params = model.init(purelm.random.key(0))
    bpe = make({i: bytes([i]) for i in range(256)} | {256: b"ab"}, [(b"a", b"b")])
    return (
        list(tree.paths(params)),
        model.leaves,
        model.apply(params, torch.arange(8)[None]).tolist(),
        encode(bpe, "abracadabra").tolist(),
        encode(bpe, "a b").tolist(),
        next(purelm.data.synthetic.sample(0)),
    )


def test_cleared_tables_are_empty_and_results_are_equal(tables):
    before = some_results()
    kept = [name for name, table in tables.items() if table.cache_info().currsize]
    assert len(kept) > 5
    clear_caches()
    assert [name for name, x in tables.items() if x.cache_info().currsize and name not in NOT_EMPTIED] == []
    assert some_results() == before
    clear_caches()
    clear_caches()  # of empty ones


def test_what_a_bpe_has_kept_is_forgotten_and_its_end_is_clean():
    from purelm.tokenizer import tables as per_bpe

    bpe = make({i: bytes([i]) for i in range(256)}, [])
    assert per_bpe.token_to_id(bpe, "a") == 97 and per_bpe._MEMO[id(bpe)]
    clear_caches()
    assert per_bpe._MEMO[id(bpe)] == {} and per_bpe.token_to_id(bpe, "a") == 97
    number = id(bpe)
    clear_caches()
    del bpe
    gc.collect()
    assert number not in per_bpe._MEMO  # and no finalizer that failed: warnings are errors


def test_memo_is_lru_cache(monkeypatch):
    """Oracle: functools.lru_cache of the same function. The kept list is put back after the test."""
    monkeypatch.setattr(caches, "_CLEARS", [])
    ours, theirs = memo(2)(divmod), functools.lru_cache(2)(divmod)
    for args in [(7, 2), (7, 2), (8, 3), (9, 4), (7, 2)]:
        assert ours(*args) == theirs(*args)
    assert ours.cache_info() == theirs.cache_info() and type(ours) is TABLE
    assert memo(None)(divmod).cache_info().maxsize is None
    calls = []
    assert on_clear(lambda: calls.append(1)) is caches._CLEARS[-1]
    clear_caches()
    assert calls == [1] and ours.cache_info().currsize == 0


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_code_goes_through_a_memo_and_survives_its_clearing(monkeypatch):
    """Oracle: eager. Clearing is no reason to compile again."""
    monkeypatch.setattr(caches, "_CLEARS", [])

    @memo(4)
    def scale(n):
        return 2.0 * n

    compiled = torch.compile(lambda x: x * scale(x.shape[0]), backend="eager", fullgraph=True)
    x = torch.arange(3.0)
    assert torch.equal(compiled(x), x * 6)
    clear_caches()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), x * 6)
