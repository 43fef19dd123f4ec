"""Accounting. Oracles: the model's own parameter shapes, torch's FLOP counter on the real model, masks, caches,
optimizer states, the course's answers as numbers, tensors that autograd really keeps.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from experiments import accounting as program
from purelm import accounting, random, tree
from purelm.models import transformer
from purelm.models.config import Config
from purelm.ops.masks import visible
from purelm.optim import adamw, lion
from purelm.testing import strategies as plm

TINY = Config(vocab_size=11, context_length=6, d_model=8, n_layers=2, n_heads=4)
XL_2026 = Config(50257, 1024, 1600, 48, 25, d_ff=4288)
XL_2025 = Config(50257, 1024, 1600, 48, 25, d_ff=6400)


def configs():
    """With what divides in many ways: up to six heads, of features that d_model does not have to be a multiple of."""
    return plm.configs(n_heads=st.sampled_from([1, 2, 4, 6]), d_ff=st.sampled_from([None, 1, 7, 20]))


@given(configs())
def test_parameters_equal_the_model(cfg):
    """Oracle: tree.n_params(init(key, cfg)), and each part by path."""
    params = transformer.init(random.key(0), cfg)
    parts = accounting.params(cfg)
    assert accounting.n_params(cfg) == sum(parts.values()) == tree.n_params(params)
    sizes = dict(zip(tree.paths(params), (x.numel() for x in tree.leaves(params)), strict=True))
    for name in ("token_embeddings", "position_embeddings", "lm_head"):
        assert parts[name] == sum(n for path, n in sizes.items() if path.startswith(name))
    for name, key in (("attention", ".attn."), ("ffn", ".ffn."), ("norms", "ln")):
        assert parts[name] == sum(n for path, n in sizes.items() if key in path), name
    assert accounting.n_params_without_embeddings(cfg) == sum(n for p, n in sizes.items() if p[:2] in ("la", "ln"))


def counted(f) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@given(configs(), st.integers(1, 3), st.integers(1, 6))
def test_forward_flops_equal_the_counter(cfg, batch_size, length):
    """Oracle: torch's FlopCounterMode on apply(), which forms all T^2 scores whatever the mask."""
    length = min(length, cfg.context_length)
    params = transformer.init(random.key(0), cfg)
    tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    flops = accounting.forward_flops(cfg, batch_size, length)
    assert sum(flops.values()) == counted(lambda: transformer.apply(params, tokens, cfg))


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "ffn": "gelu", "biases": "all"}, {"tie_embeddings": True}])
def test_train_flops_equal_the_counter(changes):
    """Oracle: FlopCounterMode on loss and gradients. remat recomputes all products but those of the head."""
    cfg = Config(**{**TINY.__dict__, **changes})
    params = tree.map(lambda p: p.requires_grad_(), transformer.init(random.key(0), cfg))
    batch = {"tokens": torch.zeros(3, 6, dtype=torch.int64), "targets": torch.zeros(3, 6, dtype=torch.int64)}

    def backward(**kwargs):
        value, _ = transformer.loss(params, batch, cfg, **kwargs)
        torch.autograd.grad(value, tree.leaves(params))

    assert accounting.train_flops(cfg, 3) == counted(backward)

    def checkpointed(block):
        return lambda *args: checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)

    head = accounting.forward_flops(cfg, 3)["lm_head"]
    with set_checkpoint_early_stop(False):
        assert accounting.train_flops(cfg, 3, remat=True) - head == counted(lambda: backward(wrap_block=checkpointed))


@given(st.integers(1, 12), st.booleans(), st.sampled_from([None, 0, 1, 3, 11, 50]))
def test_visible_pairs_equal_the_mask(length, causal, window):
    """Oracle: the mask of the reference attention, counted."""
    sides = None if window is None else (window, 0 if causal else window)
    mask = visible(length, length, causal=causal, window=sides, segment_ids=None, device=torch.device("cpu"))
    expected = length * length if mask is None else int(mask.sum())
    assert accounting.visible_pairs(length, causal=causal, window=window) == expected


def test_skip_masked_counts_visible_pairs():
    """Closed form: T (T + 1) / 2 pairs in a causal layer, 2 T - 1 where one key before is seen; the rest unchanged."""
    cfg = Config(**{**TINY.__dict__, "window": (None, 1)})
    all_pairs, seen = accounting.forward_flops(cfg, 2), accounting.forward_flops(cfg, 2, skip_masked=True)
    assert seen["scores"] == seen["values"] == 2 * 2 * 8 * (21 + 11)
    assert {k: v for k, v in seen.items() if k not in ("scores", "values")} == {
        k: v for k, v in all_pairs.items() if k not in ("scores", "values")
    }
    assert accounting.train_flops(cfg, 2, skip_masked=True) == 3 * sum(seen.values())
    both_sides = Config(**{**TINY.__dict__, "window": (None, 1), "causal": False})
    assert accounting.forward_flops(both_sides, 2, skip_masked=True)["scores"] == 2 * 2 * 8 * (36 + 16)


def test_the_course_answers():
    """Golden numbers: parameters and FLOPs of GPT-2 XL in both handouts, worked out by hand from their formulas.

    2 V D + 48 (4 D^2 + 3 D F + 2 D) + D and 48 (8 T D^2 + 4 T^2 D + 6 T D F) + 2 T D V.
    """
    assert accounting.n_params(XL_2026) == 1_640_452_800
    assert accounting.n_params(XL_2025) == 2_127_057_600
    assert sum(accounting.forward_flops(XL_2026).values()) == 3_516_769_894_400
    assert sum(accounting.forward_flops(XL_2025).values()) == 4_513_336_524_800
    assert sum(accounting.forward_flops(XL_2025, length=16384).values()) == 149_522_795_724_800
    assert accounting.forward_flops(XL_2026)["lm_head"] == 2 * 1024 * 1600 * 50257
    assert program.NEW["XL"] == XL_2026 and program.OLD["XL"] == XL_2025
    assert [c.ff_width for c in program.NEW.values()] == [2048, 2752, 3392, 4288]
    # One sequence in fp32: 48 (norms 2, q k v 3, values 1, output 1, W2 1) D + 4 F and two T^2 for each of 25 heads.
    T, D, F, V = 1024, 1600, 4288, 50257
    expected = 4 * (48 * (T * (8 * D + 4 * F) + 2 * 25 * T * T) + T * D + 2 * T * V)
    assert sum(accounting.activation_bytes(XL_2026).values()) == expected
    memory = accounting.train_bytes(XL_2026, 3)
    assert memory == {
        "parameters": 4 * 1_640_452_800,
        "gradients": 4 * 1_640_452_800,
        "optimizer": 8 * 1_640_452_800,
        "activations": 3 * expected,
    }
    assert accounting.max_batch_size(XL_2026, 80e9) == 3
    assert sum(memory.values()) <= 80e9 < sum(accounting.train_bytes(XL_2026, 4).values())
    hours = accounting.train_seconds(400_000 * accounting.train_flops(XL_2026, 1024), 495e12, 0.5) / 3600
    assert hours == pytest.approx(3 * 1024 * 3_516_769_894_400 * 400_000 / (0.5 * 495e12) / 3600)
    assert accounting.adamw_flops(10) == 140 and accounting.six_n_d(10, 20) == 1200


def test_activation_bytes_laws():
    """Laws: linear in the batch; flash removes what grows with T^2; remat keeps one block and L inputs."""
    whole = accounting.activation_bytes(TINY, 1, 6)
    assert accounting.activation_bytes(TINY, 5, 6) == {k: 5 * v for k, v in whole.items()}
    assert whole["scores"] == whole["softmax"] == 2 * 4 * 6 * 6 * 4
    flash = accounting.activation_bytes(TINY, 1, 6, flash=True)
    assert flash["scores"] == 0 and flash["softmax"] == 2 * 4 * 6 * 4
    narrow = accounting.activation_bytes(TINY, 1, 6, flash=True, bytes_per_element=2)
    assert narrow["softmax"] == flash["softmax"]  # the log-sum-exp stays fp32
    assert sum(accounting.activation_bytes(TINY, 1, 12, flash=True).values()) == 2 * sum(flash.values())
    half = accounting.activation_bytes(TINY, 1, 6, bytes_per_element=2)
    assert half == {k: v // 2 for k, v in whole.items()}
    remat = accounting.activation_bytes(TINY, 1, 6, remat=True)
    assert remat.pop("block_inputs") == 2 * 6 * 8 * 4
    outside = ("final_norm", "lm_head", "cross_entropy")
    assert remat == {k: v if k in outside else v // 2 for k, v in whole.items()}
    plain = Config(**{**TINY.__dict__, "ffn": "gelu", "norm": "none", "d_ff": 5, "n_kv_heads": 2})
    parts = accounting.activation_bytes(plain, 1, 6)
    assert parts["ffn"] == 2 * 6 * (2 * 5 + 8) * 4 and parts["norms"] == parts["final_norm"] == 0
    assert parts["qkv"] == 2 * 6 * (8 + 2 * 4) * 4
    sandwich = Config(**{**TINY.__dict__, "norm_position": "sandwich"})
    assert accounting.activation_bytes(sandwich, 1, 6)["norms"] == 2 * whole["norms"]


@pytest.mark.parametrize("dtype,size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_bytes_against_autograd(dtype, size):
    """Oracle: distinct storages that autograd keeps in the plain model: the course's list is of their size.

    Eager code keeps more (fp32 norms in bf16, rotary products, sigmoid and silu apart) and drops some (outputs of
    linear layers that only a sum reads): between 0.7 and 2 times the list for fp32, up to 3 for bf16.
    """
    cfg = Config(vocab_size=64, context_length=64, d_model=64, n_layers=3, n_heads=4)
    params = tree.map(lambda p: p.requires_grad_(), transformer.init(random.key(0), cfg, dtype=dtype))
    own = {p.untyped_storage().data_ptr() for p in tree.leaves(params)}
    kept: dict[int, int] = {}
    alive = []

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)
        return x

    tokens = torch.zeros(2, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        transformer.loss(params, {"tokens": tokens, "targets": tokens}, cfg)
    ratio = sum(kept.values()) / sum(accounting.activation_bytes(cfg, 2, bytes_per_element=size).values())
    assert 0.7 < ratio < (2.0 if size == 4 else 3.0)


@given(configs(), st.integers(1, 3))
def test_kv_cache_bytes(cfg, batch_size):
    """Oracle: the cache itself (which a model that is not causal cannot have)."""
    cfg = Config(**{**cfg.__dict__, "causal": True})
    cache = transformer.init_cache(cfg, batch_size, cfg.context_length, dtype=torch.bfloat16, device="cpu")
    assert accounting.kv_cache_bytes(cfg, batch_size) == tree.n_bytes(cache.layers)
    assert accounting.kv_cache_bytes(cfg, batch_size, 3, bytes_per_element=4) * cfg.context_length == 6 * tree.n_bytes(
        cache.layers
    )


def test_optimizer_bytes():
    """Oracle: the states themselves, less the 8 bytes of the step."""
    params = transformer.init(random.key(0), TINY)
    n = accounting.n_params(TINY)
    assert accounting.optimizer_bytes(n) == tree.n_bytes(adamw().init(params)) - 8
    half = lion(dtype=torch.bfloat16).init(params)
    assert accounting.optimizer_bytes(n, n_moments=1, bytes_per_element=2) == tree.n_bytes(half) - 8


def test_train_bytes_of_mixed_precision():
    """Closed form: fp32 masters and bf16 copies, bf16 gradients, one moment."""
    n = accounting.n_params(TINY)
    parts = accounting.train_bytes(TINY, 2, 6, copy_bytes=2, grad_bytes=2, n_moments=1, bytes_per_element=2, remat=True)
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (6 * n, 2 * n, 4 * n)
    kept = accounting.activation_bytes(TINY, 2, 6, bytes_per_element=2, remat=True)
    assert parts["activations"] == sum(kept.values())
    flash = accounting.activation_bytes(TINY, 2, 6, flash=True)
    assert accounting.train_bytes(TINY, 2, 6, flash=True)["activations"] == sum(flash.values())


@given(st.floats(1e3, 1e9))
def test_max_batch_size_is_the_largest(memory):
    """Law: it fits and one more does not; 0 where nothing fits."""
    best = accounting.max_batch_size(TINY, memory, flash=True)
    assert best >= 0
    if best:
        assert sum(accounting.train_bytes(TINY, best, flash=True).values()) <= memory
    assert sum(accounting.train_bytes(TINY, best + 1, flash=True).values()) > memory


def test_mfu_and_time_are_inverse():
    assert accounting.mfu(1e15, accounting.train_seconds(1e15, 989.4e12, 0.4), 989.4e12) == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"mfu must be in \(0, 1\], got 40"):
        accounting.train_seconds(1e15, 989.4e12, 40)


@pytest.mark.parametrize(
    "name,precision,expected",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "fp8", 1978.9e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA B200", "fp32", None),
        ("NVIDIA GB200", "bf16", None),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA L40S", "bf16", 362.05e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("some card", "bf16", None),
        ("cpu", "bf16", None),
        (torch.device("cpu"), "bf16", None),
        (torch.device("meta"), "fp32", None),
    ],
)
def test_peak_flops(name, precision, expected):
    """Golden numbers of the makers' data sheets; what is not there is None, not a guess."""
    assert accounting.peak_flops(name, precision) == expected


def test_peak_flops_of_a_gpu_reads_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert accounting.peak_flops(torch.device("cuda", 0)) == accounting.peak_flops("cuda:0") == 989.4e12
    with pytest.raises(ValueError, match="precision must be one of bf16, fp16, tf32, fp32, fp8, got 'int8'"):
        accounting.peak_flops("cuda", "int8")


def test_program_prints_the_course_answers(tmp_path, capsys):
    """Oracle: the functions above; every number of the table is also a row of the JSON."""
    path = tmp_path / "new" / "rows.json"
    program.main(program.Args(json=path))
    out = capsys.readouterr().out
    for text in ("1,640,452,800 parameters = 1.64 billion", "2,127,057,600 parameters = 2.13 billion", "202.2 days"):
        assert text in out
    rows = json.loads(path.read_text())
    assert all(set(r) == {"model", "metric", "value", "unit"} for r in rows)
    assert len({(r["model"], r["metric"]) for r in rows}) == len(rows)
    value = {(r["model"], r["metric"]): r["value"] for r in rows}
    assert value["GPT-2 XL, d_ff 4288", "parameters"] == 1_640_452_800
    assert value["GPT-2 XL at 16,384, d_ff 6400", "forward FLOPs"] == 149_522_795_724_800
    assert value["GPT-2 XL, d_ff 4288", "largest batch in 80 GB, all in fp32"] == 3


def test_program_on_a_run_and_on_flags(tmp_path, capsys):
    """Oracle: the functions on the same Config."""
    (tmp_path / "config.json").write_text(json.dumps({"model": TINY.__dict__}))
    program.main(program.Args(run=tmp_path, batch_size=2, json=tmp_path / "a.json"))
    first = json.loads((tmp_path / "a.json").read_text())
    program.main(program.Args(model=TINY, batch_size=2, json=tmp_path / "b.json", device="abacus"))
    second = json.loads((tmp_path / "b.json").read_text())
    value = {r["metric"]: r["value"] for r in first}
    assert value["train FLOPs"] == accounting.train_flops(TINY, 2)
    assert value["parameters"] == accounting.n_params(TINY)
    assert value["KV cache"] == accounting.kv_cache_bytes(TINY, 2)
    same = [r["value"] for r in second]
    assert same == [r["value"] for r in first if r["unit"] != "s"]  # no peak, no time
    assert "no bf16 peak: give --peak" in capsys.readouterr().out


@pytest.mark.parametrize("content,message", [("{", "is not the config.json of a run"), ("{}", "KeyError: 'model'")])
def test_program_names_a_bad_file(tmp_path, capsys, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit):
        program.main(program.Args(run=tmp_path))
    assert message in (error := capsys.readouterr().err) and str(tmp_path) in error and error.count("\n") == 1
