"""Rotary embeddings: complex numbers as oracle, the relative law, both layouts, and each scaling in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.kernels.rope import rope as kernel_rope
from purelm.ops.rope import RopeScaling, attention_factor, frequencies, rope, rope_tables


def turn(x, positions, layout="interleaved", **kwargs):
    cos, sin = rope_tables(positions, x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32), **kwargs)
    return rope(x, cos, sin, layout)


def test_is_multiplication_by_a_complex_number():
    """Oracle: (a + ib) exp(i position theta^(-2j/K)) in complex128."""
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    positions = torch.arange(7)
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turn(x, positions), torch.view_as_real(turned).flatten(-2))


def test_layouts_differ_by_a_permutation():
    """Exact: moving even features to the front before, and back after, turns one layout into the other."""
    x = torch.randn(2, 5, 3, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves = turn(x[..., order], torch.arange(5), "half")
    assert torch.equal(turn(x, torch.arange(5))[..., order], halves)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from(["interleaved", "half"]))
def test_products_depend_on_the_distance_alone(i, j, shift, layout):
    """Law: <R_i q, R_j k> = <R_{i+s} q, R_{j+s} k>; angles of 1e6 radians in float64 are good to 1e-10."""
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(a, b):
        return (turn(q, torch.tensor([a]), layout) * turn(k, torch.tensor([b]), layout)).sum()

    torch.testing.assert_close(product(i, j), product(i + shift, j + shift), rtol=0, atol=1e-8)


def test_position_0_changes_nothing_and_lengths_are_kept():
    """Exact at 0; law: a rotation keeps the norm."""
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64)
    y = turn(x, torch.arange(4))
    assert torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_positions_per_row():
    """Oracle: each row turned on its own."""
    x = torch.randn(2, 3, 2, 4)
    positions = torch.tensor([[5, 0, 9], [1, 1, 7]])
    y = turn(x, positions)
    for b in range(2):
        assert torch.equal(y[b : b + 1], turn(x[b : b + 1], positions[b]))


def test_gradient_and_dtypes():
    """Oracle: finite differences; bf16 is rounded once from fp32."""
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    for layout in ("interleaved", "half"):
        assert torch.autograd.gradcheck(lambda t, layout=layout: turn(t, torch.arange(3), layout), x)
    half = x.detach().bfloat16()
    y = turn(half, torch.arange(3))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, turn(half.float(), torch.arange(3)).bfloat16())


def test_tables_at_far_positions_are_right_to_fp32():
    """Oracle: math.cos in double precision; computed in fp32 the angle would be off by 0.06."""
    cos, sin = rope_tables(torch.tensor([10**6 + 1]), 4, theta=10.0)
    for j in range(2):
        angle = (10**6 + 1) * 10.0 ** (-2 * j / 4)
        assert abs(cos[0, j].item() - math.cos(angle)) < 1e-6
        assert abs(sin[0, j].item() - math.sin(angle)) < 1e-6


K, THETA, S, L = 16, 10000.0, 4.0, 64


def plain(j, scaling, length=None):
    """Frequency of pair j, from the papers, one number at a time."""
    w = THETA ** (-2 * j / K)
    kind = None if scaling is None else scaling.kind
    if kind is None:
        return w
    if kind == "linear":
        return w / S
    if kind == "ntk":
        return (THETA * S ** (K / (K - 2))) ** (-2 * j / K)
    if kind == "dynamic_ntk":
        s = 1.0 if length <= L else S * length / L - (S - 1)
        return (THETA * s ** (K / (K - 2))) ** (-2 * j / K)
    wavelength = 2 * math.pi / w
    if kind == "llama3":
        if wavelength > L / scaling.low_freq_factor:
            return w / S
        if wavelength < L / scaling.high_freq_factor:
            return w
        mix = (L / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - mix) * w / S + mix * w

    def pair_with(turns):  # solves L theta^(-2j/K) / (2 pi) = turns for j
        return K / 2 * math.log(L / (2 * math.pi * turns), THETA)

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, K - 1)
    ramp = min(max((j - low) / (high - low), 0), 1)
    return w / S * ramp + w * (1 - ramp)


SCALINGS = [
    None,
    RopeScaling("linear", S),
    RopeScaling("ntk", S),
    RopeScaling("dynamic_ntk", S, L),
    RopeScaling("llama3", S, L),
    RopeScaling("llama3", S, L, low_freq_factor=0.5, high_freq_factor=9.0),
    RopeScaling("yarn", S, L),
    RopeScaling("yarn", S, L, beta_fast=8.0, beta_slow=0.01, truncate=False),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("length", [10, 64, 200])
def test_scaling(scaling, length):
    """Oracle: the formulas of the papers for one pair at a time."""
    w = frequencies(K, THETA, scaling, length=length)
    expected = torch.tensor([plain(j, scaling, length) for j in range(K // 2)], dtype=torch.float64)
    torch.testing.assert_close(w, expected)


def test_scaling_at_its_ends():
    """Closed forms: the slowest pair of ntk is slowed by s exactly; interpolation shrinks positions by s."""
    torch.testing.assert_close(frequencies(K, THETA, RopeScaling("ntk", S))[-1], frequencies(K, THETA)[-1] / S)
    near, far = (
        rope_tables(torch.tensor([p]), K, THETA, s) for p, s in ((3, None), (12, RopeScaling("linear", S)))
    )
    torch.testing.assert_close(near, far)
    for kind in ("llama3", "yarn"):
        w = frequencies(64, THETA, RopeScaling(kind, S, 8192))
        plain_w = frequencies(64, THETA)
        assert w[0] == plain_w[0]
        torch.testing.assert_close(w[-1], plain_w[-1] / S)


def test_yarn_multiplies_tables():
    """Oracle: 0.1 ln s + 1 (arXiv:2309.00071, equation 22), or what is given."""
    scaling = RopeScaling("yarn", S, L)
    cos, sin = rope_tables(torch.arange(5), K, THETA, scaling)
    torch.testing.assert_close(cos**2 + sin**2, torch.full((5, 8), (0.1 * math.log(S) + 1) ** 2))
    assert attention_factor(RopeScaling("yarn", S, L, attention_factor=1.5)) == 1.5
    assert attention_factor(RopeScaling("linear", S)) == attention_factor(None) == 1.0


def test_bad_arguments(unchecked):
    cos, sin = rope_tables(torch.arange(2), 4)
    with pytest.raises(ValueError, match="layout must be one of interleaved, half, got 'x'"):
        rope(torch.zeros(1, 2, 1, 4), cos, sin, "x")
    with pytest.raises(ValueError, match="head_dim must be even and positive for rotary embeddings, got 3"):
        frequencies(3)
    for bad, message in (
        (dict(kind="x", factor=2.0), "kind must be one of"),
        (dict(kind="linear", factor=0.5), "factor must be at least 1 and finite, got 0.5"),
        (dict(kind="yarn", factor=2.0), "original_length must be"),
        (
            dict(kind="llama3", factor=2.0, original_length=8, low_freq_factor=4.0),
            "low_freq_factor must be above 0 and below",
        ),
        (dict(kind="yarn", factor=2.0, original_length=8, beta_fast=1.0), "beta_slow must be above 0 and below"),
    ):
        with pytest.raises(ValueError, match=message):
            RopeScaling(**bad)


def test_two_features():
    """Closed form: one pair turns by its position; ntk has no slower pair to slow."""
    for scaling in (None, RopeScaling("ntk", 4.0)):
        assert torch.equal(frequencies(2, THETA, scaling), torch.ones(1, dtype=torch.float64))


def test_each_position_may_have_a_length_of_its_own():
    """Oracle: one length at a time. dynamic_ntk alone looks at it."""
    scaling = RopeScaling("dynamic_ntk", S, L)
    lengths = torch.tensor([[1, L, L + 1, 3 * L]])
    found = frequencies(K, THETA, scaling, length=lengths)
    expected = torch.stack([frequencies(K, THETA, scaling, length=n) for n in lengths[0].tolist()])[None]
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    cos, sin = rope_tables(torch.arange(4), K, THETA, scaling, length=lengths)
    assert cos.shape == sin.shape == (1, 4, K // 2)
    torch.testing.assert_close(cos[0, 3], rope_tables(torch.tensor([3]), K, THETA, scaling, length=3 * L)[0][0])


@pytest.mark.parametrize("f", [rope, kernel_rope], ids=["reference", "kernel"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_without_heads_and_with_other_numbers_of_axes(f, layout):
    """Oracle: one head, or each sample alone, bit for bit."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 4, 6, generator=g, dtype=torch.float64)  # two batch axes, 5 positions, 4 heads
    one = rope_tables(torch.arange(5), 6, dtype=torch.float64)
    rows = rope_tables(torch.arange(5) + 7 * torch.arange(6).view(2, 3, 1), 6, dtype=torch.float64)
    for a in range(2):
        for b in range(3):
            assert torch.equal(f(x, *one, layout)[a, b], rope(x[a, b][None], *one, layout)[0])
            mine = [t[a, b] for t in rows]
            assert torch.equal(f(x, *rows, layout)[a, b], rope(x[a, b][None], *mine, layout)[0])
            assert torch.equal(f(x[a, b], *mine, layout), rope(x[a, b][None], *mine, layout)[0])
    flat = x[:, :, :, 0]  # (2, 3, 5, 6)
    assert torch.equal(f(flat, *rows, layout, heads=False), f(x[:, :, :, :1], *rows, layout)[:, :, :, 0])
    assert torch.equal(f(flat[0], *one, layout, heads=False), f(x[0, :, :, :1], *one, layout)[:, :, 0])


@pytest.mark.parametrize("f", [rope, kernel_rope], ids=["reference", "kernel"])
def test_heads_are_not_taken_for_positions(f, unchecked):
    """(B, T, K) where (B, T, H, K) is meant, and the other way round, have another length where T is looked for."""
    cos, sin = rope_tables(torch.arange(5), 6)
    for x, heads in ((torch.ones(1, 5, 6), True), (torch.ones(2, 5, 4, 6), False), (torch.ones(5, 6), True)):
        with pytest.raises(ValueError, match=rf"x must be .* with heads={heads}, got x"):
            f(x, cos, sin, heads=heads)
    with pytest.raises(ValueError, match=r"x must be|cos must be"):
        f(torch.ones(1, 5, 2, 8), cos, sin)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RopeScaling("yarn", 2.0, 1.5), "RopeScaling.original_length must be an int or None, got 1.5"),
        (lambda: RopeScaling("linear", "2"), "RopeScaling.factor must be a number, got '2'"),
        (lambda: RopeScaling("yarn", 2.0, 8, attention_factor=True), "attention_factor must be a number, got True"),
        (lambda: frequencies(8, 1.0, RopeScaling("yarn", 2.0, 8)), "theta must be above 1 for yarn"),
        (lambda: frequencies(4, 1e4, RopeScaling("ntk", 1e300)), "is not finite"),
    ],
)
def test_numbers_without_a_meaning_are_named(make, message, unchecked):
    with pytest.raises(ValueError, match=message):
        make()
