"""What checks are made of. Oracles: trees that differ in one known place, functions with one known fault."""

import re

import pytest
import torch

from purelm import random
from purelm.testing import LawError, assert_trees_close, assert_trees_equal, without
from purelm.testing.laws import draw_like, inner, require, run_laws, unchanged


def holds():
    pass


def wrong():
    require(False, "3 is not 4")


def raises():
    raise TypeError("no such thing")


TABLE = {"holds": holds, "wrong": wrong, "raises": raises}


def test_all_that_fail_are_in_one_error():
    with pytest.raises(LawError) as error:
        run_laws("check_it", TABLE, None)
    assert str(error.value) == "check_it: wrong: 3 is not 4\ncheck_it: raises: raised TypeError: no such thing"
    assert list(error.value.failures) == ["wrong", "raises"]
    failures = error.value.failures
    assert isinstance(failures["raises"], TypeError) and error.value.__cause__ is failures["wrong"]
    run_laws("check_it", TABLE, without(TABLE, "wrong", "raises"))
    with pytest.raises(LawError, match=r"^check_it: wrong: 3 is not 4$"):
        run_laws("check_it", TABLE, ["wrong"])


@pytest.mark.parametrize(
    ("laws", "message"),
    [
        (["pure"], "laws must be some of holds, wrong, raises; got pure"),
        ([], r"laws must be some of holds, wrong, raises; got none"),
        ("wrong", re.escape("got the string 'wrong'; pass ['wrong']")),
    ],
)
def test_laws_that_are_not_there(laws, message):
    with pytest.raises(ValueError, match=message):
        run_laws("check_it", TABLE, laws)


def test_without_refuses_unknown_names():
    with pytest.raises(ValueError, match="no law is called vmapp; there are holds, wrong, raises"):
        without(TABLE, "vmapp")


def some():
    return {"w": torch.tensor([[1.0, 2.0]]), "b": [torch.tensor([float("nan"), 0.0]), None], "n": torch.tensor([3])}


CHANGES = {
    "value": (lambda t: t["w"].add_(1e-3), r"differ at w: "),
    "integer": (lambda t: t["n"].add_(1), r"differ at n: "),
    "nan": (lambda t: t["b"][0].copy_(torch.tensor([0.0, float("nan")])), r"differ at b.0: "),
    "shape": (lambda t: t.update(w=t["w"][0]), r"differ at w: \(2,\) torch.float32 and not \(1, 2\) torch.float32"),
    "dtype": (lambda t: t.update(w=t["w"].double()), r"differ at w: \(1, 2\) torch.float64 and not"),
    "absent": (lambda t: t.update(w=None), "differ in structure"),
    "key": (lambda t: t.update(c=torch.ones(1)), "differ in structure"),
}


@pytest.mark.parametrize("compare", [assert_trees_equal, assert_trees_close])
@pytest.mark.parametrize("change", CHANGES)
def test_comparisons(compare, change):
    compare(some(), some())
    changed, message = some(), CHANGES[change][1]
    CHANGES[change][0](changed)
    with pytest.raises(AssertionError, match=f"gradients {message}"):
        compare(changed, some(), "gradients")


def test_close_and_equal_differ():
    """Closed form: 1 + 2^-23 is the next fp32 number after 1."""
    a, b = torch.tensor(1.0), torch.tensor(1.0 + 2**-23)
    assert_trees_close(a, b)
    with pytest.raises(AssertionError, match=r"the trees differ: 1 of 1 elements, by 1.19e-07 at most"):
        assert_trees_equal(a, b)
    assert_trees_close(a, torch.tensor(1.1), rtol=0.0, atol=0.2)
    assert_trees_equal(torch.zeros(0, 2), torch.zeros(0, 2))


FAULTS = {
    "writes": (lambda t, g: t["w"].add_(1.0), "argument 0.w was written to"),
    "writes the same": (lambda t, g: t["w"].mul_(1.0), "argument 0.w was written to"),
    "writes data": (lambda t, g: t["w"].data.fill_(5.0), "argument 0.w was written to"),
    "minus zero": (lambda t, g: t["b"][0].data[1:].mul_(-1.0), "argument 0.b.0 was written to"),
    "pops": (lambda t, g: t.pop("w"), "an argument's structure changed"),
    "puts another": (lambda t, g: t.update(w=t["w"].clone()), "argument 0.w: another object"),
    "draws": (lambda t, g: torch.rand(1), "torch's global generator was used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impure_bodies_are_found(fault):
    change, message = FAULTS[fault]
    argument = some()
    with unchanged(argument):
        _ = argument["w"] + 1
    with pytest.raises(AssertionError, match=message), unchanged(argument):
        change(argument, None)


def test_draws_and_inner_products():
    """Oracle: random.normal with the leaf's own key; the sum written out."""
    like = {"b": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor([1]), "w": torch.zeros(3, 0)}
    drawn = draw_like(like, 7)
    expected = random.normal(random.fold_in(random.key(7), 0), (2,), dtype=torch.float64).to(torch.bfloat16)
    assert torch.equal(drawn["b"], expected) and drawn["n"] is like["n"] and drawn["w"].shape == (3, 0)
    assert not torch.equal(draw_like(like, 8)["b"], drawn["b"])
    a = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor([5])}
    assert float(inner(a, {"x": torch.tensor([3.0, -1.0]), "n": torch.tensor([5])})) == 1.0
