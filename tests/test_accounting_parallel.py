"""Communication rooflines. Oracles: the ring algorithms carried out and counted, sums over the model's leaves as
purelm.dist cuts them, numbers worked out by hand for the course's xl and for the 8B model, search over batches.
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm import accounting
from purelm.accounting.parallel import (
    communication_bytes,
    critical_tokens,
    max_tensor_ranks,
    phases,
    rank_bytes,
    smallest_batch,
    table,
)
from purelm.dist.sharding import part_shape
from purelm.models.config import Config
from purelm.models.layers import leaves

XL = Config(10_000, 512, 2560, 32, 32, d_ff=10_240)  # of assignment 2
EIGHT = Config(151_936, 32_768, 4096, 34, 32, d_ff=11_008)  # of its leaderboard in 2026
SMALL = Config(64, 16, 32, 4, 4, d_ff=96)
GIB = 2**30


def ring(n_ranks, collective):
    """Chunks that a rank sends when the ring algorithm is carried out, each rank owning one of the message's."""
    has = [{(rank, rank)} if collective == "all_gather" else set() for rank in range(n_ranks)]  # (chunk, origin)
    sums = [{chunk: {rank} for chunk in range(n_ranks)} for rank in range(n_ranks)]
    sent = 0
    if collective in ("reduce_scatter", "all_reduce"):
        for t in range(n_ranks - 1):
            moved = [(rank, (rank - t - 1) % n_ranks) for rank in range(n_ranks)]
            moved = [(rank, chunk, set(sums[rank][chunk])) for rank, chunk in moved]
            for rank, chunk, ranks in moved:
                sums[(rank + 1) % n_ranks][chunk] |= ranks
            sent += 1
        assert all(sums[rank][rank] == set(range(n_ranks)) for rank in range(n_ranks))
        has = [{(rank, rank)} for rank in range(n_ranks)]
    if collective in ("all_gather", "all_reduce"):
        for t in range(n_ranks - 1):
            moved = [((rank - t) % n_ranks, (rank - t) % n_ranks) for rank in range(n_ranks)]
            for rank, chunk in enumerate(moved):
                assert chunk in has[rank]
                has[(rank + 1) % n_ranks].add(chunk)
            sent += 1
        assert all(len(h) == n_ranks for h in has)
    return sent


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_volumes_are_those_of_ring_algorithms(n_ranks):
    """Oracle: chunks counted while carrying the rings out; P parameters are n_ranks chunks of P / n_ranks."""
    P = accounting.n_params(SMALL)
    chunk = {name: ring(n_ranks, name) * P / n_ranks for name in ("all_gather", "reduce_scatter", "all_reduce")}
    sent = {s: communication_bytes(SMALL, scheme=s, n_data=n_ranks, param_bytes=2) for s in ("ddp", "zero1", "fsdp")}
    assert sum(sent["ddp"].values()) == pytest.approx(4 * chunk["all_reduce"])
    assert sum(sent["zero1"].values()) == pytest.approx(2 * chunk["all_gather"] + 4 * chunk["reduce_scatter"])
    assert sum(sent["fsdp"].values()) == pytest.approx(4 * chunk["all_gather"] + 4 * chunk["reduce_scatter"])
    tensor = communication_bytes(SMALL, 3, 5, n_tensor=n_ranks)
    hidden = 3 * 5 * 32 * 2
    assert tensor["forward_tensor"] == tensor["backward_tensor"]
    # 4 layers; attention and ffn; sequence parallelism: one reduce_scatter and one all_gather in place of each
    assert tensor["forward_tensor"] == pytest.approx(4 * 2 * ring(n_ranks, "all_reduce") * hidden / n_ranks)
    both = sum(ring(n_ranks, name) for name in ("reduce_scatter", "all_gather"))
    assert tensor["forward_tensor"] == pytest.approx(4 * 2 * both * hidden / n_ranks)


def test_fsdp_sends_half_more_than_the_others():
    for N in (2, 5):
        ddp, zero1, fsdp = (sum(communication_bytes(XL, scheme=s, n_data=N).values()) for s in ("ddp", "zero1", "fsdp"))
        assert zero1 == pytest.approx(ddp) and fsdp == pytest.approx(1.5 * ddp)


def test_the_course_model_by_hand():
    """3.41 B parameters: fp32 gradients are 13.6 GB, 34 to 45 ms on two GPUs at 400 to 300 GB/s; 1024 tokens at
    500 TFLOP/s take 42 ms by 6 N D.
    """
    assert accounting.n_params(XL) == 2 * 10_000 * 2560 + 32 * (4 * 2560**2 + 3 * 2560 * 10_240 + 2 * 2560) + 2560
    slow, fast = (phases(XL, 2, peak=500e12, bandwidth=w, n_data=2) for w in (300e9, 400e9))
    assert fast["backward"].communication == pytest.approx(0.03407, rel=1e-3)
    assert slow["backward"].communication == pytest.approx(0.04542, rel=1e-3)
    assert fast["forward"].communication == 0.0
    compute = fast["forward"].compute + fast["backward"].compute
    assert compute == pytest.approx(accounting.train_flops(XL, 2) / 500e12, rel=1e-12)
    by_6nd = accounting.six_n_d(accounting.n_params(XL), 1024) / 500e12
    assert by_6nd == pytest.approx(0.0419, rel=2e-3) and compute == pytest.approx(by_6nd, rel=0.03)


def test_the_8b_model_by_hand():
    """121 GiB of states, 60.5 a GPU under FSDP of 2; 30.3 parameters, 30.3 gradients, 60.5 moments; bf16 weights 15.1;
    FSDP sends 22.7 GiB; gathered layers 2 x 0.4; ZeRO-1 holds 30.3 + 30.3 + 30.3 + 15.1 = 106.
    """
    states = ("parameters", "gradients", "optimizer")
    ddp = rank_bytes(EIGHT)
    assert [round(ddp[k] / GIB, 1) for k in states] == [30.3, 30.3, 60.5]
    assert sum(ddp[k] for k in states) / GIB == pytest.approx(121, abs=0.5)
    fsdp = rank_bytes(EIGHT, scheme="fsdp", n_data=2, copy_bytes=2)
    assert sum(fsdp[k] for k in states) / GIB == pytest.approx(60.5, abs=0.1)
    assert fsdp["gathered"] / GIB == pytest.approx(2 * 0.377, abs=0.002)
    zero1 = rank_bytes(EIGHT, scheme="zero1", n_data=2, copy_bytes=2)
    assert sum(zero1[k] for k in (*states, "gathered")) / GIB == pytest.approx(106, abs=0.1)
    assert zero1["gathered"] / GIB == pytest.approx(15.1, abs=0.05)
    sent = communication_bytes(EIGHT, scheme="fsdp", n_data=2, param_bytes=2, grad_bytes=2)
    assert sum(sent.values()) / GIB == pytest.approx(22.7, abs=0.05)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("cfg", [SMALL, Config(50, 7, 24, 3, 4, d_ff=37), XL], ids=["small", "odd", "xl"])
def test_memory_is_the_sum_over_leaves(cfg, n_ranks):
    """Oracle: the leaf table cut as purelm.dist.sharding cuts them, equal where N divides every axis 0."""
    shapes = [leaf.shape for leaf in leaves(cfg).values()]
    n_bytes = sum(4 * math.prod(part_shape(s, n_ranks)) for s in shapes)
    rows = sum(4 * math.prod(s[1:]) for s in shapes)  # at most one more row in each leaf
    held = rank_bytes(cfg, scheme="fsdp", n_data=n_ranks, gathered_blocks=0)
    assert held["parameters"] <= n_bytes <= held["parameters"] + rows
    if all(s[0] % n_ranks == 0 for s in shapes):
        assert held["parameters"] == n_bytes
    assert held["gradients"] == held["parameters"] and 0 <= 2 * held["parameters"] - held["optimizer"] < 2
    zero1 = rank_bytes(cfg, scheme="zero1", n_data=n_ranks)
    whole = accounting.train_bytes(cfg)
    assert zero1["optimizer"] == held["optimizer"] and zero1["parameters"] == whole["parameters"]
    assert rank_bytes(cfg, scheme="ddp", n_data=n_ranks) == {**whole, "gathered": 0}


def test_memory_of_activations_and_copies_is_that_of_one_process():
    kinds = {"bytes_per_element": 2, "flash": True, "remat": True}
    held = rank_bytes(XL, 4, 100, scheme="zero1", n_data=4, copy_bytes=2, **kinds)
    whole = accounting.train_bytes(XL, 4, 100, copy_bytes=2, **kinds)
    assert held["activations"] == whole["activations"]
    assert held["parameters"] + held["gathered"] == whole["parameters"]
    blocks = rank_bytes(XL, scheme="fsdp", n_data=4, gathered_blocks=3)["gathered"]
    one = sum(math.prod(x.shape) for p, x in leaves(XL).items() if p.startswith(("layers.0.attn", "layers.0.ffn")))
    assert blocks == 3 * 4 * one


layouts = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(["ddp", "zero1", "fsdp"]),
        "n_data": st.integers(1, 5),
        "n_tensor": st.integers(1, 5),
        "param_bytes": st.sampled_from([2, 4]),
        "grad_bytes": st.sampled_from([2, 4]),
        "peak": st.sampled_from([1e12, 3e13]),
        "bandwidth": st.sampled_from([1e9, 7e10]),
        "tensor_bandwidth": st.sampled_from([None, 2e9, 1e12]),
    }
)


@given(layouts, st.integers(1, 16))
def test_the_smallest_batch_by_search(kinds, length):
    """Oracle: the first batch for which compute is at least communication in both phases."""

    def hidden(batch_size):
        found = phases(SMALL, batch_size, length, **kinds).values()
        return all(p.compute >= p.communication * (1 - 1e-12) for p in found)

    smallest = smallest_batch(SMALL, length, **kinds)
    if smallest is None:
        assert not hidden(1) and not hidden(10**12)
    else:
        assert hidden(smallest)
        assert smallest == 1 or not hidden(smallest - 1) or smallest > 10**9


@pytest.mark.parametrize("scheme", ["ddp", "fsdp", "zero1"])
@pytest.mark.parametrize("n_ranks", [2, 8])
def test_tokens_that_hide_do_not_depend_on_the_model(scheme, n_ranks):
    """The closed form against the models' own FLOPs, which have attention and no embedding beside 6 N D."""
    peak, bandwidth = 400e12, 50e9
    tokens = critical_tokens(n_ranks, peak, bandwidth)
    assert tokens == pytest.approx((n_ranks - 1) / n_ranks * 8000)
    for cfg in (XL, EIGHT):
        kinds = {"peak": peak, "bandwidth": bandwidth, "param_bytes": 2, "grad_bytes": 2}
        smallest = smallest_batch(cfg, 8, scheme=scheme, n_data=n_ranks, **kinds)
        # Without the embedding's parameters, which compute nothing but are sent: 1.5 % of XL, 7.7 % of the 8B.
        assert 8 * smallest == pytest.approx(tokens, rel=0.09)
    assert critical_tokens(1, peak, bandwidth) == 0.0
    assert critical_tokens(n_ranks, peak, bandwidth, 4) == 2 * tokens


@pytest.mark.parametrize("bandwidth", [30e9, 100e9, 400e9])
def test_most_tensor_ranks(bandwidth):
    """Oracle: phases with one rank more; forward binds first, having half of backward's compute."""
    most = max_tensor_ranks(XL, peak=500e12, bandwidth=bandwidth)
    for n, hides in ((most, True), (most + 1, False)):
        forward = phases(XL, 3, peak=500e12, bandwidth=bandwidth, n_tensor=n)["forward"]
        assert (forward.compute >= forward.communication) == hides
        assert (smallest_batch(XL, peak=500e12, bandwidth=bandwidth, n_tensor=n) is None) != hides


def test_two_dimensions():
    """FSDP over 4 of matrices in halves: the scheme's bytes halve but for norms, the activations' do not change."""
    flat = communication_bytes(XL, 2, scheme="fsdp", n_data=4)
    both = communication_bytes(XL, 2, scheme="fsdp", n_data=4, n_tensor=2)
    norms = 4 * accounting.params(XL)["norms"] * 3 / 4
    for part in ("forward_gather", "backward_gather", "backward_gradients"):
        assert 2 * both[part] == pytest.approx(flat[part] + norms, rel=1e-12)
    assert both["forward_tensor"] == communication_bytes(XL, 2, n_tensor=2)["forward_tensor"]
    slow = phases(XL, 2, peak=1e14, bandwidth=1e10, tensor_bandwidth=1e11, scheme="fsdp", n_data=4, n_tensor=2)
    assert slow["forward"].communication == pytest.approx(both["forward_gather"] / 1e10 + both["forward_tensor"] / 1e11)
    assert slow["forward"].compute == pytest.approx(sum(accounting.forward_flops(XL, 2).values()) / 2 / 1e14)


def test_table():
    """By hand: 42.6 ms are 3.41 B parameters less the embedding, and attention; backward's two thirds hide 28.4."""
    assert accounting.train_flops(XL, 2) / 500e12 == pytest.approx(0.0426, abs=5e-5)
    lines = table(XL, 2, n_ranks=2, peak=500e12, bandwidth=400e9).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ddp", "| zero1", "| fsdp", "| tensor"]
    ddp, _, fsdp, tensor = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert ddp[1:4] == ["13.6", "42.6", "34.1"] and ddp[5:] == ["5.7", "3", "50.8"]
    assert fsdp[1] == "20.4" and fsdp[-1] == tensor[-1] == "25.4"
    assert tensor[2] == "42.6"  # the same work: all sequences, half of each matrix


def test_errors():
    with pytest.raises(ValueError, match="scheme must be one of ddp, zero1, fsdp, got 'zero3'"):
        communication_bytes(XL, scheme="zero3")
    with pytest.raises(ValueError, match="n_data must be at least 1, got 0"):
        rank_bytes(XL, n_data=0)
    with pytest.raises(ValueError, match="n_tensor must be at least 1, got -1"):
        phases(XL, peak=1.0, bandwidth=1.0, n_tensor=-1)
