"""cuda_graph on a GPU. Oracle: the same function called as it is, on copies of the same arguments, to the bit."""

import os

import pytest
import torch

from purelm import random, tree
from purelm.kernels.fused import FUSED
from purelm.models import transformer
from purelm.ops import REFERENCE
from purelm.optim import adamw, chain, clip_by_global_norm, schedules
from purelm.train import FULL, MIXED, init_state, make_step
from purelm.transforms import cuda_graph, jit

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first call
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator (make gpu-test)"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # dynamo's, of a Function
]
CUDA = torch.device("cuda")
CFG = transformer.Config(vocab_size=97, context_length=64, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2)


def make_batch(i, rows=8):
    x = random.randint(random.fold_in(random.key(7), i), (rows, CFG.context_length + 1), 0, CFG.vocab_size).to(CUDA)
    return {"tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous()}


def copied(state):
    return tree.map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)


def assert_same_bits(a, b):
    assert tree.structure(a) == tree.structure(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, path


@pytest.fixture
def deterministic():
    """Embedding's backward adds by atomics otherwise, in an order that changes from run to run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ops", [REFERENCE, FUSED], ids=["reference", "fused"])
@pytest.mark.parametrize("precision", [FULL, MIXED], ids=["fp32", "mixed"])
@pytest.mark.compile
def test_a_step_follows_the_one_without_a_graph(ops, precision, deterministic):
    """Nine steps, a learning rate that changes each time, another shape of batch in between, and a restored state."""
    optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))

    def loss(params, batch):
        return transformer.loss(params, batch, CFG, ops=ops)

    step = jit(make_step(loss, optimizer, schedules.cosine(1e-2, 100, n_warmup=10), precision=precision), donate=0)
    graphed = cuda_graph(step, donate=0)
    start = init_state(transformer.init(random.key(0, device=CUDA), CFG), optimizer)
    plain, mine = copied(start), copied(start)
    at = {x.data_ptr() for x in tree.leaves(mine)}
    kept = []
    for i in range(9):
        batch = make_batch(i)
        if i == 6:
            mine = copied(mine)  # as from a checkpoint: the state lies elsewhere now
        old = mine
        plain, expected = step(plain, batch)
        mine, metrics = graphed(mine, batch)
        kept.append((metrics, copied(expected)))
        assert_same_bits(mine, plain)
        assert i >= 6 or {x.data_ptr() for x in tree.leaves(mine)} == at
        with pytest.raises(RuntimeError, match=r"donated to cuda_graph\("):
            old.step + 1
    for metrics, expected in kept:  # no later step has written over them
        assert_same_bits(metrics, expected)


# Results that lie in donated memory, permuted, passed on, or read from what another result overwrites.
ALIASING = {
    "new": lambda s: {"a": s["a"] + s["b"], "b": s["a"] - s["b"]},
    "swap": lambda s: {"a": s["b"], "b": s["a"]},
    "pass on": lambda s: {"a": s["a"], "b": s["b"] + s["a"]},
    "doubled": lambda s: ({"a": s["a"], "b": s["a"]}, s["a"]),
    "transpose": lambda s: {"a": s["a"].T, "b": s["b"].flip(0)},
    "view beside": lambda s: ({"a": s["a"] + 1, "b": s["b"] * 2}, s["a"][0], s["b"].view(-1)),
    "in other order": lambda s: (s["a"].sum(), {"b": s["b"] + 1, "a": s["a"] * s["b"]}),
    "numbers": lambda s: ({"a": s["a"] * 2, "b": s["b"]}, 3, "text", None, [True]),
}


@pytest.mark.parametrize("name", ALIASING)
def test_donation_without_jit(name):
    f = ALIASING[name]
    graphed = cuda_graph(f, donate=0, n_warmup=1)
    state = {"a": torch.randn(5, 5, device=CUDA), "b": torch.randn(5, 5, device=CUDA)}
    for _ in range(3):
        expected = copied(f(copied(state)))
        out = graphed(copied(state))
        assert_same_bits(out, expected)
    places = [x.untyped_storage().data_ptr() for x in tree.leaves(out) if isinstance(x, torch.Tensor)]
    assert len(set(places)) == len(places)


def test_arguments_that_are_not_donated_stay_and_may_be_views():
    graphed = cuda_graph(lambda x, y: (x @ y, x), n_warmup=1)
    for i in range(4):
        x, y = torch.randn(6, 4, device=CUDA).T, torch.randn(1, 6, device=CUDA).expand(3, 6).T
        before = copied((x, y))
        out = graphed(x, y)
        assert_same_bits(out, (x.contiguous() @ y.contiguous(), x))
        assert_same_bits((x, y), before)
        assert out[1].data_ptr() != x.data_ptr() or i == 0


def test_numbers_and_shapes_have_graphs_of_their_own():
    calls = []

    def f(x, n, *, flag):
        calls.append((x.shape, n, flag))
        return x * n if flag else x + n

    graphed = cuda_graph(f, n_warmup=2)
    for _ in range(4):
        for shape in ((3,), (4, 2)):
            for n in (2, 3):
                for flag in (True, False):
                    x = torch.randn(shape, device=CUDA)
                    assert torch.equal(graphed(x, n, flag=flag), x * n if flag else x + n)
    # 8 kinds, 4 records: two calls of each kind run f as it is, and the third and fourth record anew.
    assert len(calls) == 8 * 4
    calls.clear()
    for _ in range(5):
        graphed(x, n, flag=flag)
    assert not calls


def test_what_a_graph_cannot_hold_is_refused_and_nothing_breaks():
    x = torch.ones(3, device=CUDA)
    waits = cuda_graph(lambda x: x * x.sum().item(), n_warmup=1)
    assert waits(x).tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="something that a CUDA graph cannot record"):
        waits(x)
    fits = cuda_graph(lambda x: x + 1, n_warmup=1)
    for _ in range(3):
        assert fits(x).tolist() == [2.0] * 3
    mixed = cuda_graph(lambda x, y: x + 1, n_warmup=1)
    mixed(x, torch.ones(2))
    with pytest.raises(ValueError, match="a tensor is on cpu and another on cuda"):
        mixed(x, torch.ones(2))
    with pytest.raises(ValueError, match=r"requires grad.*pass x.detach\(\)"):
        fits(torch.ones(3, device=CUDA, requires_grad=True))
    with pytest.raises(ValueError, match="trees of tensors and of hashable values"):
        mixed(x, {1, 2})


def test_a_donated_tensor_without_a_result():
    graphed = cuda_graph(lambda s: {"a": s["a"] * 2}, donate=0, n_warmup=1)
    state = {"a": torch.ones(2, device=CUDA), "b": torch.ones(3, device=CUDA)}
    graphed(copied(state))
    with pytest.raises(ValueError, match=r"cuda_graph: donated tensors match no result.*0\.b \(3,\)"):
        graphed(state)
    assert state["b"].tolist() == [1.0] * 3  # intact
    with pytest.raises(ValueError, match="share memory"):
        graphed({"a": state["a"], "b": state["a"][:1]})
