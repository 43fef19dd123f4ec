"""Trees: laws by hypothesis, optree as the oracle of order, and equality of compiled and eager walks."""

import dataclasses
from collections import OrderedDict, defaultdict

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm import tree
from purelm.testing import strategies as plm
from purelm.testing.strategies import Pair, trees


def same(a, b):
    """Equal structure, and the very same leaves."""
    return tree.structure(a) == tree.structure(b) and all(
        x is y for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)
    )


def look_up(t, path):
    for name in path.split("."):
        t = getattr(t, name) if isinstance(t, Pair) else t[name] if isinstance(t, dict) else t[int(name)]
    return t


@given(trees())
def test_flatten_and_unflatten_are_inverse(t):
    """Oracle: the tree itself; optree for the order of the leaves."""
    leaves, treedef = tree.flatten(t)
    assert all(x is y for x, y in zip(leaves, optree.tree_leaves(t), strict=True))
    assert same(tree.unflatten(treedef, leaves), t)
    assert tree.structure(t) == treedef
    assert all(x is y for x, y in zip(tree.leaves(t), leaves, strict=True))


@given(trees(st.integers()))
def test_map_keeps_identity_and_composition(t):
    """Oracle: the laws of a functor."""
    f, g = (lambda x: 2 * x + 1), (lambda x: x * x)
    assert tree.map(lambda x: x, t) == t
    assert tree.map(f, tree.map(g, t)) == tree.map(lambda x: f(g(x)), t)
    assert tree.map(lambda x, y: x - y, t, t) == tree.map(lambda x: 0, t)


@given(trees())
def test_partition_then_combine_gives_the_tree_back(t):
    """Oracle: the tree itself, leaf by leaf; each leaf is on the side that the predicate says."""

    def predicate(path, x):
        return "a" in path or x.ndim > 1

    yes, no = tree.partition(predicate, t)
    assert same(tree.combine(yes, no), t)
    assert same(tree.combine(no, yes), t)
    for path, x in zip(tree.paths(t), tree.leaves(t), strict=True):
        chosen, other = (yes, no) if predicate(path, x) else (no, yes)
        assert look_up(chosen, path) is x if path else chosen is x
        assert look_up(other, path) is None if path else other is None


@given(trees())
def test_paths_lead_to_the_leaves(t):
    """Oracle: looking the path up by hand."""
    paths = tree.paths(t)
    if paths == [""]:
        assert isinstance(t, torch.Tensor)
        return
    assert all(look_up(t, p) is x for p, x in zip(paths, tree.leaves(t), strict=True))
    seen = []
    mapped = tree.map_with_path(lambda p, x: seen.append((p, x)) or p, t)
    assert [p for p, _ in seen] == paths
    assert tree.leaves(mapped) == paths


@given(trees())
def test_ravel_round_trip_restores_shapes_and_dtypes(t):
    """Oracle: the tree itself; promotion among floating dtypes loses nothing."""
    vector, unravel = tree.ravel(t)
    assert vector.ndim == 1 and vector.numel() == tree.n_params(t)
    back = unravel(vector)
    assert tree.structure(back) == tree.structure(t)
    for x, y in zip(tree.leaves(back), tree.leaves(t), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@given(trees())
def test_sizes_and_finiteness(t):
    """Oracle: sums over optree's leaves."""
    leaves = optree.tree_leaves(t)
    assert tree.n_params(t) == sum(x.numel() for x in leaves)
    assert tree.n_bytes(t) == sum(x.nbytes for x in leaves)
    assert bool(tree.all_finite(t)) is True
    squares = sum((x.double() ** 2).sum() for x in leaves)
    norm = torch.as_tensor(squares).double().sqrt()
    torch.testing.assert_close(tree.global_norm(t).double(), norm, rtol=1e-6, atol=0)
    zeros = tree.zeros_like(t)
    assert all(z.dtype == x.dtype and not z.any() for z, x in zip(tree.leaves(zeros), leaves, strict=True))


def test_lists_longer_than_ten_are_numbered_in_order():
    """Oracle: the numbers written out; text order would put 10 before 2."""
    t = {"layers": [{"w": i} for i in range(12)]}
    assert tree.paths(t) == [f"layers.{i}.w" for i in range(12)]
    assert tree.leaves(t) == list(range(12))


def test_paths_are_names_of_a_state_dict():
    t = Pair(first={"layers": [{"attn": {"q_proj": {"weight": 1}}}]}, second=(2, None, [3]))
    assert tree.paths(t) == ["first.layers.0.attn.q_proj.weight", "second.0", "second.2.0"]
    assert tree.paths(torch.zeros(2)) == [""]


def test_dict_keys_are_visited_sorted_and_kept_in_their_own_order():
    t = {"b": 1, "a": 2}
    seen = []
    mapped = tree.map_with_path(lambda p, x: seen.append(p) or x, t)
    assert seen == ["a", "b"] and list(mapped) == ["b", "a"] and tree.leaves(t) == [2, 1]
    assert list(tree.map(lambda x: x, t)) == ["b", "a"]


def test_other_dicts_keep_their_type():
    """Oracle: optree."""
    ordered = OrderedDict([("b", 1), ("a", 2)])
    default = defaultdict(list, {"b": 1, "a": 2})
    mixed = {2: "two", "one": 1, 1.5: None}
    for t in (ordered, default, mixed):
        assert tree.map_with_path(lambda p, x: x, t) == t
        assert type(tree.map_with_path(lambda p, x: x, t)) is type(t)
        assert tree.map_with_path(lambda p, x: x, t) == optree.tree_map(lambda x: x, t)
        seen = []
        tree.map_with_path(lambda p, x, seen=seen: seen.append(x), t)
        assert seen == optree.tree_leaves(t)
    assert tree.paths(ordered) == ["b", "a"]
    assert tree.map_with_path(lambda p, x: x, default).default_factory is list


def test_torch_size_is_a_leaf():
    assert tree.paths({"shape": torch.Size([2, 3])}) == ["shape"]


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({"x": {"y": 1}}, {"x": {"z": 1}}, "x: dict with keys ['y'] against dict with keys ['z']"),
        ({"x": [1, 2]}, {"x": [1]}, "x: list of 2 against list of 1"),
        ({"x": [1, (2,)]}, {"x": [1, [2]]}, "x.1: tuple of 1 against list of 1"),
        ({"x": None}, {"x": 3}, "x: None against leaf of type int"),
        (Pair(1, {"w": 2}), Pair(1, None), "second: dict with keys ['w'] against None"),
        (Pair(1, 2), (1, 2), "the root: Pair of 2 against tuple of 2"),
    ],
)
def test_different_structures_name_the_path(a, b, where):
    for function in (tree.map, tree.map_with_path):
        with pytest.raises(ValueError) as error:
            function(lambda *xs: None, a, b)
        assert where in str(error.value)


def test_rest_may_go_deeper_and_be_absent():
    """jax's rule: the first tree is a prefix of the rest."""
    params = {"w": 1, "b": 2}
    assert tree.map(lambda p, g: g, params, {"w": None, "b": (5, 6)}) == {"w": None, "b": (5, 6)}
    assert tree.map_with_path(lambda path, p, g: g, params, {"w": None, "b": (5, 6)}) == {"w": None, "b": (5, 6)}


def test_errors_of_f_pass_through_unchanged():
    def f(*xs):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        tree.map(f, {"w": 1}, {"w": 2})


def test_combine_refuses_two_leaves_and_different_forms():
    with pytest.raises(ValueError, match=r"leaf at a\.0"):
        tree.combine({"a": [1]}, {"a": [2]})
    with pytest.raises(ValueError, match="differ at a"):
        tree.combine({"a": [1]}, {"a": (None,)})
    with pytest.raises(ValueError, match="differ at a"):
        tree.combine({"a": [1]}, {"a": 2})
    with pytest.raises(ValueError, match="no tree"):
        tree.combine()
    t = {"a": [1, None], "b": None}
    assert tree.combine(t) is t
    assert tree.combine({"a": [1, None, None]}, {"a": [None, 2, None]}, {"a": [None, None, 3]}) == {"a": [1, 2, 3]}


@given(trees(), st.data())
def test_none_in_place_of_a_subtree_takes_the_others(t, data):
    """Law: whatever subtrees are cut out as None, the other half fills them in. Oracle: the tree itself."""

    def cut(x):
        """(one half, the other): at each node either half has all of it, or the cut goes on below."""
        where = data.draw(st.sampled_from(["first", "second", "below"]))
        if where != "below" or not isinstance(x, (dict, list, tuple)):
            return (x, None) if where == "first" else (None, x)
        if isinstance(x, dict):
            pairs = {k: cut(v) for k, v in x.items()}
            return tuple({k: pair[i] for k, pair in pairs.items()} for i in (0, 1))
        pairs = [cut(v) for v in x]
        make = list if type(x) is list else tuple if type(x) is tuple else lambda xs: type(x)(*xs)
        return tuple(make([pair[i] for pair in pairs]) for i in (0, 1))

    first, second = cut(t)
    assert same(tree.combine(first, second), t)
    assert same(tree.combine(second, first), t)


def test_unflatten_needs_the_right_number_of_leaves():
    with pytest.raises(ValueError):
        tree.unflatten(tree.structure([1, 2]), [1])


def test_ravel_refuses_what_it_could_not_restore():
    with pytest.raises(ValueError, match=r"'step' has dtype torch.int64"):
        tree.ravel({"a": torch.zeros(2), "step": torch.zeros((), dtype=torch.int64)})
    vector, unravel = tree.ravel({"a": torch.tensor([1, 2]), "b": torch.tensor([3])})
    assert vector.dtype == torch.int64 and unravel(vector)["b"].tolist() == [3]
    with pytest.raises(ValueError, match=r"\(4,\), the tree needs \(3,\)"):
        unravel(torch.zeros(4))


def test_ravel_copies_and_unravel_views():
    t = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    vector, unravel = tree.ravel(t)
    vector += 1
    assert torch.equal(t["a"], torch.ones(2, 2))
    assert unravel(vector)["a"].data_ptr() == vector.data_ptr()
    single, _ = tree.ravel(torch.ones(2))
    single += 1
    assert single.tolist() == [2, 2]


def test_mixed_dtypes_are_promoted_to_hold_both():
    """bfloat16 and float16 have no common half type."""
    t = {"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.float16)}
    assert tree.ravel(t)[0].dtype == torch.float32
    assert tree.ravel({})[0].shape == (0,)


def test_ravel_under_torch_func():
    """Oracle: the gradient in closed form, through unravel."""
    vector, unravel = tree.ravel({"a": torch.ones(2), "b": torch.full((2,), 3.0)})
    gradient = torch.func.grad(lambda v: (unravel(v)["a"] * unravel(v)["b"]).sum())(vector)
    assert gradient.tolist() == [3, 3, 1, 1]


def test_cast_touches_floating_leaves_only():
    t = {"w": torch.ones(2), "step": torch.tensor(3), "name": "x", "n": 4}
    out = tree.cast(t, torch.bfloat16)
    assert out["w"].dtype == torch.bfloat16 and out["step"] is t["step"] and out["name"] == "x" and out["n"] == 4
    assert tree.cast(t, torch.float32)["w"] is t["w"]
    assert tree.n_params(t) == 3 and tree.n_bytes(t) == 8 + 8
    assert tree.to(t, "meta")["w"].device.type == "meta" and tree.to(t, "meta")["name"] == "x"


def test_global_norm_accumulates_in_fp32_or_more():
    """Oracle: closed forms; 300 ones squared would round to 256 in bfloat16."""
    assert tree.global_norm({"w": torch.ones(300, dtype=torch.bfloat16)}).item() == pytest.approx(300**0.5, rel=1e-6)
    assert tree.global_norm({"w": torch.ones(300, dtype=torch.bfloat16)}).dtype == torch.float32
    fine = tree.global_norm({"w": torch.full((3,), 1e-200, dtype=torch.float64), "v": torch.zeros(1)})
    assert fine.dtype == torch.float64 and fine.item() == pytest.approx(3**0.5 * 1e-200)
    assert tree.global_norm({"step": torch.tensor(5)}).item() == 0.0
    assert tree.global_norm({}).shape == ()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_all_finite_finds_one_bad_element(bad):
    t = {"a": torch.ones(3), "b": torch.ones(2, 2), "step": torch.tensor(1)}
    assert tree.all_finite(t).dtype == torch.bool and bool(tree.all_finite(t))
    t["b"][1, 0] = bad
    assert not bool(tree.all_finite(t))
    assert bool(tree.all_finite({}))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite_in_each_format(dtype):
    """Oracle: isfinite of the numbers in fp64; the largest number is finite, though sums of it are not."""
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    for bad in (0.0, float("inf"), float("-inf"), float("nan")):
        wide = torch.stack((largest[0].double(), torch.tensor([1.0, bad, 2.0], dtype=torch.float64)))
        t = {"large": (-largest.double()).to(dtype), "x": wide.to(dtype).T, "none": torch.ones(0, 3, dtype=dtype)}
        assert bool(tree.all_finite(t)) == bool(torch.isfinite(t["x"].double()).all()) == (bad == 0.0)


@pytest.mark.parametrize("empty", [{}, [], (), None, {"a": {}, "b": [None]}])
def test_empty_trees(empty):
    assert tree.leaves(empty) == [] and tree.paths(empty) == [] and tree.n_params(empty) == 0
    assert tree.map(lambda x: x, empty) == empty
    assert tree.partition(lambda p, x: True, empty) == (empty, empty)
    vector, unravel = tree.ravel(empty)
    assert vector.shape == (0,) and unravel(vector) == empty


def test_registered_types_work_with_optree_but_have_no_paths():
    from collections import deque

    t = {"a": deque([1, 2])}
    assert tree.map(lambda x: x + 1, t) == {"a": deque([2, 3])}
    with pytest.raises(ValueError, match="a is a deque"):
        tree.paths(t)


@pytest.mark.parametrize("reduced", [tree.n_params, tree.n_bytes, tree.global_norm, tree.all_finite])
def test_leaves_that_could_hide_tensors_are_refused(reduced):
    """A dataclass is one opaque leaf, which counted as nothing. Oracle: its own tensors, seen through vars."""
    layer = Layer(torch.ones(3))
    with pytest.raises(ValueError, match=rf"{reduced.__name__}: net\.1 is of type Layer"):
        reduced({"net": [torch.ones(2), layer]})
    with pytest.raises(ValueError, match="the root is of type Linear"):
        reduced(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="w is of type ndarray"):
        reduced({"w": torch.ones(2).numpy()})
    assert tree.n_params({"net": [torch.ones(2), vars(layer)]}) == 5
    plain = {"w": torch.ones(2), "n": 3, "x": 1.5, "yes": True, "name": "linear", "dtype": torch.float32, "none": None}
    reduced({**plain, "size": torch.Size([2]), "device": torch.device("cpu")})


@dataclasses.dataclass
class Layer:
    weight: torch.Tensor


@given(trees(st.integers(-9, 9)))
def test_reduce(t):
    """Oracle: a loop over the leaves, in order (f is not commutative)."""
    expected = 1
    for x in tree.leaves(t):
        expected = 3 * expected - x
    assert tree.reduce(lambda total, x: 3 * total - x, t, 1) == expected


@pytest.mark.compile
def test_compiled_walks_equal_eager_ones_in_one_graph():
    """Oracle: the same function in eager mode. fullgraph=True: no walk breaks the graph."""
    t = {
        "z": [{"w": torch.randn(2, 3), "none": None} for _ in range(11)],
        "a": Pair((torch.randn(2), torch.randn(1)), {"y": torch.randn(3), "b": torch.randn(2)}),
        "o": OrderedDict([("q", torch.randn(1)), ("p", torch.randn(2))]),
    }
    vector, unravel = tree.ravel(t)
    outside = tree.structure(t)

    def f(t, vector):
        yes, no = tree.partition(lambda path, x: path.startswith("z") and x.ndim > 1, t)
        leaves, treedef = tree.flatten(t)
        assert treedef == tree.structure(t) and treedef != tree.structure(yes)
        assert len(tree.leaves(t)) == len(leaves)
        return {
            "map": tree.map(lambda x, y: x - 2 * y, t, unravel(vector)),
            "path": tree.map_with_path(lambda path, x: x * len(path), t),
            "columns": tree.flatten_up_to(t, unravel(vector), yes)[0],
            "same": tree.unflatten(tree.flatten_up_to(t, t)[1], leaves),
            "combined": tree.combine(yes, no),
            "subtree": tree.combine({"x": t["a"], "y": None}, {"x": None, "y": t["z"]}),
            "stacked": tree.unstack(tree.stack([t["z"][0], t["z"][1]])),
            "flat": tree.from_flat(tree.to_flat(t["z"])),
            "sum": tree.reduce(lambda total, x: total + x.sum(), t, 0.0),
            "yes": yes,
            "paths": tree.paths(t),
            "unflat": tree.unflatten(treedef, [x + 1 for x in leaves]),
            "leaves": tree.leaves(t),
            "norm": tree.global_norm(t),
            "finite": tree.all_finite(t),
            "cast": tree.cast(t, torch.bfloat16),
            "ravel": tree.ravel(t)[0],
            "n": (tree.n_params(t), tree.n_bytes(t)),
        }

    eager, compiled = f(t, vector), torch.compile(f, fullgraph=True, backend="eager")(t, vector)
    assert optree.tree_structure(eager) == optree.tree_structure(compiled)
    for x, y in zip(optree.tree_leaves(eager), optree.tree_leaves(compiled), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
    assert list(compiled["map"]) == ["z", "a", "o"] and list(compiled["map"]["o"]) == ["q", "p"]
    assert outside == tree.structure(compiled["map"])


@pytest.mark.compile
def test_compiled_map_still_names_the_path():
    """Dynamo falls back to eager for a frame that raises: the message is eager's."""

    @torch.compile(backend="eager")
    def f(a, b):
        return tree.map(lambda x, y: x + y, a, b)

    with pytest.raises(ValueError, match="differ at x: list of 2 against list of 1"):
        f({"x": [torch.zeros(1), torch.zeros(1)]}, {"x": [torch.zeros(1)]})


@pytest.mark.compile
def test_frames_that_dynamo_gives_up_walk_trees_too():
    """Oracle: eager mode. A break inside a loop makes dynamo run the frame as it is, and compile what it calls."""

    def f(t, compiled):
        for _ in range(2):
            if compiled:
                torch._dynamo.graph_break()
            leaves, treedef = tree.flatten(t)
            same = tree.structure(t) == treedef
            dims = tree.map(lambda x: x.ndim, t)
            yes, no = tree.partition(lambda path, x: path == "b", t)
            nothing = tree.map(lambda x, y: None, t, dims)
            t = tree.map(lambda x, y: x + y, tree.unflatten(treedef, leaves), tree.combine(yes, no))
        return t, same, dims, nothing, tree.paths(t), tree.n_params(t)

    t = {"b": torch.ones(2), "a": [torch.zeros(3)], "c": {"d": Pair(torch.ones(1), {"e": torch.ones(2)})}}
    eager, compiled = f(t, False), torch.compile(f, backend="eager")(t, True)
    assert tree.structure(eager) == tree.structure(compiled)
    for x, y in zip(tree.leaves(eager), tree.leaves(compiled), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@given(plm.tensors(dtype=(*plm.FLOATS, *plm.INTEGERS), layouts=("contiguous", "transposed", "sliced", "expanded")))
def test_as_bytes(x):
    """Oracle: numpy's bytes of a contiguous copy; bf16, which numpy lacks, has the upper halves of fp32's."""
    if x.dtype == torch.bfloat16:
        expected = x.float().contiguous().numpy().view("uint16")[..., 1::2].tobytes() if x.ndim and x.numel() else None
    else:
        expected = x.contiguous().numpy().tobytes()
    found = tree.as_bytes(x)
    assert found.dtype == torch.uint8 and found.shape == (x.nbytes,)
    assert expected is None or found.numpy().tobytes() == expected
