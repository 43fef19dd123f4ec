"""ZeRO-1 on two Gloo processes. Oracle: the same optimizer in one process, on the mean of all ranks' gradients.

Two gradients have one sum whatever the order, so element-wise optimizers agree with it to the last bit; where a norm
or a loss over halves of a batch comes in, to the rounding of the dtype.
"""


import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from purelm import random, tree
from purelm.dist import messages, zero, zero_state
from purelm.dist.agreement import check_equal
from purelm.dist.sharding import shard
from purelm.dist.world import rank_of, size_of
from purelm.optim import (
    adamw,
    apply_updates,
    chain,
    clip,
    clip_by_global_norm,
    hidden_matrix,
    is_matrix,
    lion,
    muon,
    muon_adamw,
    partitioned,
    rmsprop,
    scale_lr,
    sgd,
)
from purelm.train import Precision, init_state, make_step
from purelm.transforms import jit
from tests.dist.models import equal, made
from tests.dist.processes import ALL_GATHER, REDUCE_SCATTER, RankError, run

MIXED = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WRAPPERS = {"sharded": zero.sharded, "whole_tensors": zero.whole_tensors}
ELEMENTWISE = {
    "adamw": lambda norm: adamw(weight_decay=0.1),
    "adamw_masked": lambda norm: adamw(weight_decay=0.5, mask=is_matrix),
    "lion": lambda norm: lion(weight_decay=0.1, mask=lambda path, p: "w" in path),
    "momentum": lambda norm: sgd(0.9, 0.1, nesterov=True),
    "rmsprop": lambda norm: rmsprop(0.9, momentum=0.5, weight_decay=0.1),
    "plain": lambda norm: sgd(),
    "nothing": lambda norm: chain(),  # updates in the dtype of the gradients
    "partitioned": lambda norm: partitioned(lambda path, p: path == "nest.0.w", sgd(0.5), adamw(dtype=torch.bfloat16)),
    "clipped": lambda norm: chain(clip_by_global_norm(0.5, norm=norm), adamw(eps=0.1)),
}
OF_WHOLE_LEAVES = {
    "muon": lambda norm: partitioned(is_matrix, muon(iteration_dtype=torch.float64), sgd(0.9)),
    "muon_adamw": lambda norm: muon_adamw(iteration_dtype=torch.float64),
}
CASES = [(w, o) for w in WRAPPERS for o in ELEMENTWISE] + [("whole_tensors", o) for o in OF_WHOLE_LEAVES]


def gradients(seed, step, rank, dtypes, params):
    """Some are absent in some steps, everywhere alike."""
    found = made(1000 * seed + 10 * step + rank + 1, dtypes)
    if step == 1:
        found["nest"][0]["odd"] = found["nest"][0]["vector"] = None
    if step == 2:
        found["nest"][0]["scalar"] = None
    return found


def mean(*trees):
    return tree.map(lambda *xs: sum(xs[1:], xs[0]) / len(xs), *trees)


def on_rank_matches(wrapper, name, dtypes, seed, options):
    """Parameters, updates and the state put together, step by step; arguments are not written to."""
    maker = {**ELEMENTWISE, **OF_WHOLE_LEAVES}[name]
    inner, whole = maker(zero.global_norm()), maker(tree.global_norm)
    optimizer = WRAPPERS[wrapper](inner, **options)
    rank, N = rank_of(None), size_of(None)
    params = made(seed, dtypes)
    state, expected = optimizer.init(params), whole.init(params)
    exact = N == 2 and name in ELEMENTWISE and name != "clipped"  # a product's rounding depends on strides
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtypes == (torch.float64,) else {"rtol": 1e-6, "atol": 1e-6}

    def check(found, wanted):
        if exact:
            assert equal(found, wanted)
        else:
            assert tree.structure(found) == tree.structure(wanted)
            for x, y in zip(tree.leaves(found), tree.leaves(wanted), strict=True):
                torch.testing.assert_close(x, y, **tolerance)

    for step in range(4):
        everyone = [gradients(seed, step, r, dtypes, params) for r in range(N)]
        lr = torch.tensor(0.1 / (step + 1))
        expected_updates, expected = whole.update(mean(*everyone), expected, params, lr)
        given = mean(*everyone) if options.get("reduce", "mean") is None else everyone[rank]
        kept = tree.map(torch.clone, (given, state, params))
        updates, new_state = optimizer.update(given, state, params, lr)
        assert equal((given, state, params), kept)
        state = new_state
        if name == "nothing" and wrapper == "whole_tensors":  # sent in fp32
            updates = tree.map(lambda u, g: u.to(g.dtype), updates, given)
        check(updates, expected_updates)
        check_equal(updates, what="updates")
        params = apply_updates(params, updates)
        like = whole.init(tree.map(lambda p: p.to("meta"), params))
        gathered = zero_state.gather_state(state, like)
        check(gathered, expected)
        assert equal(zero_state.cut_state(gathered, optimizer.init(params)), state)


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize(("wrapper", "name"), CASES)
def test_ranks_together_are_one_process(wrapper, name, seed):
    options = {"bucket_bytes": 200} if seed == 7 else {}
    run(on_rank_matches, wrapper, name, (torch.float64,), seed, options)


@pytest.mark.parametrize("dtypes", [(torch.float32,), MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize(("wrapper", "name"), [(w, o) for w, o in CASES if o in ("adamw_masked", "nothing", "muon")])
def test_dtypes(wrapper, name, dtypes):
    run(on_rank_matches, wrapper, name, tuple(dtypes), 3, {"bucket_bytes": 200})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_clipped_to_the_norm_over_all_ranks(wrapper, dtype):
    run(on_rank_matches, wrapper, "clipped", (dtype,), 11, {})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_three_ranks(wrapper):
    """Parts of which one or two are all filling, sums in an order of their own."""
    run(on_rank_matches, wrapper, "adamw", (torch.float64,), 5, {"bucket_bytes": 300}, size=3)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("bucket_bytes", [1, 64, 10**9])
def test_buckets_of_any_size(wrapper, bucket_bytes):
    run(on_rank_matches, wrapper, "momentum", tuple(MIXED), 13, {"bucket_bytes": bucket_bytes})


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_reduced_before(wrapper):
    run(on_rank_matches, wrapper, "adamw", (torch.float64,), 17, {"reduce": None, "check": False})


def on_rank_options(wrapper):
    rank, N = rank_of(None), size_of(None)
    params = made(0, (torch.float32,))
    everyone = [gradients(0, 0, r, (torch.float32,), params) for r in range(N)]
    summed = tree.map(torch.add, *everyone)
    optimizer = WRAPPERS[wrapper](sgd(), reduce="sum")
    updates, _ = optimizer.update(everyone[rank], optimizer.init(params), params, 0.25)
    assert equal(updates, tree.map(lambda g: -0.25 * g, summed))
    # nothing has a gradient: nothing has an update
    none = tree.map(lambda p: None, params)
    updates, state = optimizer.update(none, optimizer.init(params), params, 0.25)
    assert tree.leaves(updates) == [] and int(state.step) == 1
    # a group of this process alone, in which the optimizer is the one that is wrapped
    alone = [dist.new_group([r]) for r in range(N)][rank]
    optimizer = WRAPPERS[wrapper](adamw(), alone)
    found = optimizer.update(everyone[rank], optimizer.init(params), params, 0.25)
    assert equal(found, adamw().update(everyone[rank], adamw().init(params), params, 0.25))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sums_absent_gradients_and_groups(wrapper):
    run(on_rank_options, wrapper)


def on_rank_wire():
    """Oracle: gradients rounded to bf16 and added in it, and the mean of the sum in fp32."""
    rank = rank_of(None)
    params = made(0, (torch.float32,))
    everyone = [gradients(0, 0, r, (torch.float32,), params) for r in range(2)]
    optimizer = zero.sharded(sgd(), wire=torch.bfloat16)
    updates, _ = optimizer.update(everyone[rank], optimizer.init(params), params, 1.0)
    narrow = [tree.cast(one, torch.bfloat16) for one in everyone]
    assert equal(updates, tree.map(lambda a, b: -((a + b).float() / 2), *narrow))


def test_gradients_on_a_narrow_wire():
    run(on_rank_wire)


def on_rank_state_size():
    params = {"a": torch.zeros(8, 5), "b": torch.zeros(6), "c": torch.zeros(10, 2, 2), "d": torch.zeros(2, 3)}
    cut = zero.sharded(adamw()).init(params)
    whole = zero.whole_tensors(adamw()).init(params)
    return tree.n_params((cut.m, cut.v)), tree.n_params((whole.m, whole.v)), tree.paths(whole.m)


def test_each_rank_holds_half_of_the_state():
    (cut0, whole0, paths0), (cut1, whole1, paths1) = run(on_rank_state_size)
    assert cut0 == cut1 == whole0 == whole1 == 92  # of twice 92 numbers
    assert sorted(paths0 + paths1) == ["a", "b", "c", "d"]


def on_rank_messages(wrapper, bucket_bytes):
    """What is sent: (name of the collective, bytes), in order."""
    sent = []

    def counted(where, name, size):
        original = getattr(where, name)

        def call(*args, **kwargs):
            tensors = [args[size]] if isinstance(args[size], torch.Tensor) else args[size]
            sent.append((name, sum(x.nbytes for x in tensors)))
            return original(*args, **kwargs)

        setattr(where, name, call)
        return original

    params = {"a": torch.zeros(8, 4), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(16), "d": None}
    optimizer = WRAPPERS[wrapper](adamw(), bucket_bytes=bucket_bytes, check=False)
    state = optimizer.init(params)
    # of what is whole: the second argument of a reduce_scatter, the first of all others
    places = [(dist, REDUCE_SCATTER, 1), (dist, ALL_GATHER, 0), (dist, "reduce", 0), (dist, "broadcast", 0)]
    originals = [(where, name, counted(where, name, size)) for where, name, size in places]
    try:
        optimizer.update(params, state, params, 0.1)
    finally:
        for where, name, original in originals:
            setattr(where, name, original)
    return sent


def test_messages_are_those_of_the_docstring():
    """Of a: 128 bytes, b: 14 (16 filled up; its update 28 or 32), c: 64."""
    sent = run(on_rank_messages, "sharded", 10**6)
    assert sent[0] == sent[1] == [(REDUCE_SCATTER, 192), (REDUCE_SCATTER, 16), (ALL_GATHER, 224)]
    sent = run(on_rank_messages, "sharded", 64)[0]
    assert sent == [(REDUCE_SCATTER, n) for n in (128, 16, 64)] + [(ALL_GATHER, n) for n in (128, 32, 64)]
    sent = run(on_rank_messages, "whole_tensors", 10**6)
    assert (
        sent[0] == sent[1] == [("reduce", 128), ("reduce", 14), ("reduce", 64), ("broadcast", 128), ("broadcast", 92)]
    )


def test_two_messages_are_under_way():
    """The next one is sent before the last is waited for, and no third."""
    log = []

    class Message:
        def __init__(self, i):
            log.append(f"send {i}")
            self.i = i

        def wait(self):
            log.append(f"wait {self.i}")
            return self.i

    assert list(messages.in_turn(Message(i) for i in range(4))) == [0, 1, 2, 3]
    assert log == ["send 0", "send 1", "wait 0", "send 2", "wait 1", "send 3", "wait 2", "wait 3"]
    assert list(messages.in_turn([])) == []


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_assignment_is_balanced(sizes, n_ranks):
    """Greedy bound: no rank has more than the mean and the largest leaf; largest first, at most 4/3 of the best."""
    owners = zero.assign(sizes, n_ranks)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(n_ranks)]
    lower = max([sum(sizes) / n_ranks, *sizes]) if sizes else 0
    if len(sizes) > n_ranks:
        ordered = sorted(sizes, reverse=True)
        lower = max(lower, ordered[n_ranks - 1] + ordered[n_ranks])
    assert sum(loads) == sum(sizes) and max(loads) <= sum(sizes) / n_ranks + max(sizes, default=0)
    assert len(sizes) > 8 or max(loads) <= 4 / 3 * _best(sizes, n_ranks, lower) + 1e-9
    shifted = zero.assign(sizes, n_ranks, [0] * (n_ranks - 1) + [10**6])
    assert n_ranks == 1 or n_ranks - 1 not in shifted


def _best(sizes, n_ranks, lower):
    """The fullest rank of the best assignment, by trying all."""
    best = sum(sizes)

    def place(i, loads):
        nonlocal best
        if best <= lower or max(loads, default=0) >= best:
            return
        if i == len(sizes):
            best = max(loads)
            return
        for r in {load: r for r, load in enumerate(loads)}.values():
            place(i + 1, [load + sizes[i] * (k == r) for k, load in enumerate(loads)])

    place(0, [0] * n_ranks)
    return best


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_alone_it_is_the_optimizer(wrapper):
    params, grads = made(0), made(1)
    optimizer, plain = WRAPPERS[wrapper](adamw()), adamw()
    found = optimizer.update(grads, optimizer.init(params), params, 0.1)
    assert equal(found, plain.update(grads, plain.init(params), params, 0.1))
    assert zero_state.gather_state(found[1], None) is zero_state.cut_state(found[1], None) is found[1]
    assert torch.equal(zero.global_norm()(grads), tree.global_norm(grads))
    assert messages.from_owners([grads["nest"][0]["w"]], [0])[0] is grads["nest"][0]["w"]


def test_wrong_arguments():
    for name, wrapper in WRAPPERS.items():
        with pytest.raises(ValueError, match=f'{name}: reduce must be one of "sum", "mean".* or None, got \'max\''):
            wrapper(adamw(), reduce="max")
        with pytest.raises(ValueError, match=f"{name}: bucket_bytes must be at least 1, got 0"):
            wrapper(adamw(), bucket_bytes=0)
    with pytest.raises(ValueError, match='whole_tensors: reduce must be one of "sum", "mean" or None, got \'parts\''):
        zero.whole_tensors(adamw(), reduce="parts")


def on_rank_norm(dtype):
    """Oracle: tree.global_norm of the whole."""
    whole = made(2, (dtype,))
    norm = zero.global_norm()
    wanted = tree.global_norm(whole)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norm(shard(whole)), wanted, rtol=tolerance, atol=0)
    mine = tree.map(lambda x: x if rank_of(None) == 1 else None, whole)  # rank 0 holds nothing
    torch.testing.assert_close(norm(mine).to(wanted.dtype), wanted, rtol=1e-6, atol=0)
    huge = {"w": torch.full((2,), 1.5e19)}
    torch.testing.assert_close(norm(shard(huge)), torch.tensor(1.5e19 * 2**0.5))  # whose square overflows fp32
    bad = {"w": torch.tensor([1.0, float("nan")])}
    assert norm(shard(bad)).isnan()  # on rank 1, known to both
    clipped, found = clip(shard(whole), 0.5, norm=norm)
    assert torch.equal(found, norm(shard(whole)))
    torch.testing.assert_close(norm(clipped), torch.tensor(0.5, dtype=wanted.dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_global_norm(dtype):
    run(on_rank_norm, dtype)


def on_rank_differs(wrapper, where):
    params, grads = ({"a": torch.zeros(2), "b": [torch.zeros(3, 4), torch.zeros(1)]} for _ in range(2))
    if rank_of(None) == 1:
        if where == "params":
            params["b"][0] = torch.zeros(4, 3)
        if where == "grads":
            grads["b"][1] = None
        if where == "form":
            grads["b"] = grads["b"][0]
    optimizer = WRAPPERS[wrapper](adamw())
    optimizer.update(grads, optimizer.init(params), params, 0.1)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("params", "ranks differ at b.0: (3, 4) float32 on rank 0; (4, 3) float32 on rank 1"),
        ("grads", "ranks differ at grads.b.1: (1,) float32 on rank 0; no such leaf on rank 1"),
        ("form", "ranks differ at grads.b.0: (3, 4) float32 on rank 0; no such leaf on rank 1"),
    ],
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_rank_that_differs_is_named_on_all_ranks(wrapper, where, message):
    with pytest.raises(RankError) as error:
        run(on_rank_differs, wrapper, where)
    assert error.value.errors == dict.fromkeys((0, 1), f"ValueError: zero.{wrapper}: {message}")
    run(on_rank_differs, wrapper, "nowhere")


def on_rank_state_errors():
    params = {"a": torch.zeros(4, 2), "b": torch.zeros(3)}
    state = zero.sharded(adamw()).init(params)
    with pytest.raises(ValueError, match=r"gather_state: ranks hold .*'v.b'\], `like` has \['m.a'"):
        zero_state.gather_state(state, lion().init(params))
    with pytest.raises(ValueError, match=r"cut_state: the state has \['m.a', 'm.b', 'step'\], the ranks hold"):
        zero_state.cut_state(lion().init(params), state)
    with pytest.raises(ValueError, match=r"cut_state: m.a has shape \(3, 2\), rank . needs \(2, 2\)"):
        zero_state.cut_state(adamw().init({"a": torch.zeros(5, 2), "b": torch.zeros(3)}), state)
    with pytest.raises(ValueError):  # a tree of bools for a mask: this rank has no leaf where it has one
        zero.whole_tensors(adamw(mask={"a": True, "b": False})).update(
            params, zero.whole_tensors(adamw()).init(params), params, 0.1
        )


def test_states_of_another_optimizer():
    run(on_rank_state_errors)


# A model: both wrappers at once, real gradients of halves of a batch, the training step, torch.compile.


def network(seed, dtype):
    sizes = {"embeddings": (9, 6), "w1": (6, 8), "b1": (8,), "lm_head": (8, 9), "gain": ()}
    items = enumerate(sizes.items())
    return {k: random.normal(random.fold_in(random.key(seed), i), s, dtype=dtype) * 0.3 for i, (k, s) in items}


def network_loss(params, batch):
    x = params["embeddings"][batch["inputs"]]
    x = torch.tanh(x @ params["w1"] + params["b1"]) * (1 + params["gain"])
    logits = x @ params["lm_head"]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()), {}


def distributed(name):
    norm = zero.global_norm()
    return {
        "both": partitioned(hidden_matrix, zero.whole_tensors(muon()), zero.sharded(adamw())),
        "momentum": zero.whole_tensors(sgd(0.9)),
        "whole": zero.whole_tensors(muon_adamw(update_scale="original", adamw_lr_scale=0.5)),
        "clipped": zero.sharded(chain(clip_by_global_norm(0.1, norm=norm), scale_lr(sgd(0.9), 2.0))),
        "lion": zero.sharded(lion()),
    }[name]


def in_one(name):
    return {
        "both": partitioned(hidden_matrix, muon(), adamw()),
        "momentum": sgd(0.9),
        "whole": muon_adamw(update_scale="original", adamw_lr_scale=0.5),
        "clipped": chain(clip_by_global_norm(0.1), scale_lr(sgd(0.9), 2.0)),
        "lion": lion(),
    }[name]


def on_rank_trains(name, dtype, compiled):
    rank, N = rank_of(None), size_of(None)
    batch = {"inputs": torch.arange(32).view(8, 4) % 9, "targets": (torch.arange(32).view(8, 4) * 5 + 1) % 9}
    part = tree.map(lambda x: x.chunk(N)[rank], batch)

    def schedule(step):
        return 0.01 / (step + 1)

    state = init_state(network(0, dtype), distributed(name), precision(dtype))
    expected = init_state(network(0, dtype), in_one(name), precision(dtype))
    step = make_step(network_loss, distributed(name), schedule, precision=precision(dtype))
    step = jit(step, donate=0) if compiled else step
    whole_step = make_step(network_loss, in_one(name), schedule, precision=precision(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for i in range(4):
        if compiled:
            torch._dynamo.config.error_on_recompile = i > 0
        state, _ = step(state, part)
        expected, _ = whole_step(expected, batch)
        for path, x, y in zip(
            tree.paths(state.params), tree.leaves(state.params), tree.leaves(expected.params), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, path=path: f"{path}: {m}")
    if compiled:
        torch._dynamo.config.error_on_recompile = False
    check_equal(state.params, what="parameters")


def precision(dtype):
    return Precision(dtype, dtype, dtype)


@pytest.mark.parametrize("name", ["both", "whole", "clipped", "lion"])
def test_training_on_halves_of_the_batch(name):
    run(on_rank_trains, name, torch.float64, False)


def test_training_in_fp32():
    run(on_rank_trains, "clipped", torch.float32, False)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["momentum", "clipped"])
def test_compiled_and_donated(name):
    run(on_rank_trains, name, torch.float64, True)
