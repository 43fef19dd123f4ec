"""experiments.dpo end to end: a small model of our own, trained on pairs of answers, resumed, exported.

Oracles: the uninterrupted run, to the last bit; one process, and one microbatch, for many; the data, for what is
learned; sums of log-probabilities by the plain functions of the model.
"""

import json

import pytest
import torch

from purelm import checkpoint, random, tree
from purelm.align.preferences import dpo
from purelm.models import hf, transformer
from purelm.tokenizer import encode, token_to_id
from tests.dist import processes
from tests.experiments.small_model import END, write_inputs
from tests.programs import run_here

# The chosen answer is the sum, the rejected one is not.
ROWS = [
    {"prompt": f"{a} + {b} =", "chosen": f" {a + b}", "rejected": f" {9 - a - b}"} for a in range(4) for b in range(4)
]
FLAGS = [
    "--prompt", "{prompt}", "--batch-size", "8", "--max-length", "16", "--device", "cpu", "--optim.lr", "3e-3",
    "--optim.warmup-steps", "1", "--optim.schedule", "constant", "--max-new-tokens", "4", "--generations", "2",
    "--compute", "fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with weights/, train.jsonl and heldout.jsonl."""
    lines = [f"{r['prompt']}{r['chosen']}" for r in ROWS]
    return write_inputs(tmp_path_factory.mktemp("dpo"), lines, ROWS, "train", "heldout")


def given(inputs):
    return ["--model", inputs / "weights", "--train", inputs / "train.jsonl", "--heldout", inputs / "heldout.jsonl"]


def run(inputs, folder, *flags, status=0):
    done = run_here("experiments.dpo", "--run", folder, *given(inputs), *FLAGS, *flags)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def heldout(folder):
    return [r for r in rows(folder / "metrics.jsonl") if "heldout_loss" in r]


def sums_by_hand(folder):
    return sums_of(*hf.load(folder))


def sums_of(params, cfg, bpe):
    """[chosen, rejected]: the log-probabilities of all pairs' answers, by a plain pass of one row at a time."""
    found = []
    for side in ("chosen", "rejected"):
        total = []
        for row in ROWS:
            p, y = encode(bpe, row["prompt"]).tolist(), [*encode(bpe, row[side]).tolist(), token_to_id(bpe, END)]
            log_p = transformer.apply(params, torch.tensor([p + y]), cfg)[0].double().log_softmax(-1)
            total.append(sum(log_p[len(p) - 1 + i, k] for i, k in enumerate(y)))
        found.append(torch.stack(total))
    return found


def test_it_learns_to_prefer_and_exports(inputs, tmp_path):
    """From log 2 and margins of 0 to all pairs right; the last row is that of the exported model, by hand."""
    run(inputs, tmp_path / "run", "--steps", "30", "--eval-every", "15")
    first, _, last = heldout(tmp_path / "run")
    assert first["heldout_loss"] == pytest.approx(0.693147, abs=1e-6) and first["heldout_accuracy"] == 0.0
    assert last["heldout_accuracy"] > 0.9 and last["heldout_policy_accuracy"] > 0.9
    assert last["heldout_margin"] > 0.2 and last["heldout_loss"] < 0.65
    assert {r["step"] for r in rows(tmp_path / "run/generations.jsonl")} == {0, 15, 30}
    sums = [x for folder in (tmp_path / "run/export", inputs / "weights") for x in sums_by_hand(folder)]
    losses, aux = dpo(*sums, beta=0.1)
    assert last["heldout_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert last["heldout_margin"] == pytest.approx(float(aux["margin"].mean()), abs=1e-4)
    assert last["heldout_chosen_log_p"] == pytest.approx(float(sums[0].mean()), abs=1e-3)
    assert (tmp_path / "run/report.html").read_text().count("[wanted]") == 2


@pytest.mark.parametrize(
    "flags", [("--loss", "kto", "--microbatches", "2"), ("--lora.rank", "4", "--loss", "dpo_norm")]
)
def test_resumed_is_uninterrupted(inputs, tmp_path, flags):
    """Oracle: the run of 4 steps without a break, to the last bit."""
    run(inputs, tmp_path / "whole", "--steps", "4", *flags)
    run(inputs, tmp_path / "part", "--steps", "2", *flags)
    before = (tmp_path / "part/reference.safetensors").stat().st_mtime_ns
    assert "resumed from step 2" in run(inputs, tmp_path / "part", "--steps", "4", "--resume", *flags)
    assert (tmp_path / "part/reference.safetensors").stat().st_mtime_ns == before  # read, not made again
    a, b = (checkpoint.load(tmp_path / name / "checkpoints", 4)[0] for name in ("whole", "part"))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@pytest.mark.parametrize("loss", ["kto", "simpo", "orpo", "cpo"])
def test_microbatches_change_nothing(inputs, tmp_path, loss):
    """Oracle: one microbatch. fp32: what is left is the order of sums; KTO's KL is of the whole batch."""
    for parts in ("1", "4"):
        run(inputs, tmp_path / parts, "--steps", "3", "--loss", loss, "--microbatches", parts, "--eval-every", "0")
    one, four = (rows(tmp_path / parts / "metrics.jsonl") for parts in ("1", "4"))
    for a, b in zip(one, four, strict=True):
        for name in {"loss", "margin", "grad_norm", "kl", "heldout_loss"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (name, a, b)


def test_the_reference_is_kept(inputs, tmp_path):
    """Used again where model and data are the same, made again where not, refused where damaged."""
    run(inputs, tmp_path / "run", "--steps", "1", "--save-every", "0")
    path = tmp_path / "run/reference.safetensors"
    kept = path.read_bytes()
    for name in ("checkpoints", "export"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])) + "\n")
    run(inputs, tmp_path / "run", "--steps", "1", "--train", tmp_path / "train.jsonl")
    assert path.read_bytes() != kept
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    (tmp_path / "run/checkpoints").rename(tmp_path / "others")
    said = run(inputs, tmp_path / "run", "--steps", "1", status=2)
    assert "reference.safetensors: is damaged" in said and "Traceback" not in said
    path.write_bytes(kept[:40])
    assert "is damaged" in run(inputs, tmp_path / "run", "--steps", "1", status=2)


@pytest.fixture(scope="module")
def other(inputs):
    """A folder of weights of another shape and seed with the same tokenizer."""
    _, _, bpe = hf.load(inputs / "weights")
    cfg = transformer.Config(296, 24, 16, 1, 2, rope_layout="half")
    hf.save(inputs / "other", transformer.init(random.key(5), cfg), cfg, bpe)
    return inputs / "other"


def test_another_reference(inputs, other, tmp_path):
    """Oracle: the loss by hand of both models' sums, before and after; a run that goes on needs the same reference."""
    flags = ("--reference", other, "--optim.name", "rmsprop", "--optim.momentum", "0.5")
    run(inputs, tmp_path / "run", "--steps", "2", *flags)
    reference = sums_by_hand(other)
    for row, folder in zip(heldout(tmp_path / "run"), (inputs / "weights", tmp_path / "run/export"), strict=True):
        losses, aux = dpo(*sums_by_hand(folder), *reference, beta=0.1)
        assert row["heldout_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
        assert row["heldout_margin"] == pytest.approx(float(aux["margin"].mean()), abs=1e-4)
    assert heldout(tmp_path / "run")[0]["heldout_loss"] != pytest.approx(0.693147, abs=1e-4)
    run(inputs, tmp_path / "whole", "--steps", "4", *flags)
    moved = other.rename(inputs / "moved")
    flags = ("--reference", moved, *flags[2:])
    assert "resumed from step 2" in run(inputs, tmp_path / "run", "--steps", "4", "--resume", *flags)
    a, b = (checkpoint.load(tmp_path / name / "checkpoints", 4)[0] for name in ("whole", "run"))
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    said = run(inputs, tmp_path / "run", "--steps", "6", "--resume", *flags[2:], status=2)
    assert "reference (its content)" in said and "Traceback" not in said
    moved.rename(other)


def test_rmsprop_is_torch_s(inputs, tmp_path):
    """Oracle: torch.optim.RMSprop on the same loss, parameters and batches: one step, then the exported weights."""
    flags = ("--optim.name", "rmsprop", "--optim.alpha", "0.9", "--optim.clip", "0", "--batch-size", "16")
    run(inputs, tmp_path / "run", "--steps", "1", "--optim.warmup-steps", "0", *flags)
    params, cfg, bpe = hf.load(inputs / "weights")
    leaves = [x.requires_grad_() for x in tree.leaves(params)]
    sums = sums_of(params, cfg, bpe)
    optimizer = torch.optim.RMSprop(leaves, lr=3e-3, alpha=0.9)
    dpo(*sums, *(x.detach() for x in sums), beta=0.1)[0].mean().backward()
    optimizer.step()
    found, _, _ = hf.load(tmp_path / "run/export")
    # A first step is lr sqrt(10) g / |g|, which turns round with the sign of a gradient that is rounding alone.
    off = torch.cat([(a - b.detach()).abs().flatten() for a, b in zip(tree.leaves(found), leaves, strict=True)])
    assert float((off > 1e-5).double().mean()) < 0.02, off.max()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--loss", "kto"), ("--lora.rank", "2"), ("--parallel.mode", "fsdp")])
def test_two_processes_train_as_one(inputs, tmp_path, flags):
    """Oracle: one process; fp32 sums in another order."""
    common = [*FLAGS, "--steps", "3", "--eval-every", "2", *flags]
    run(inputs, tmp_path / "one", "--steps", "3", "--eval-every", "2", *flags)
    command = [*given(inputs), *common]
    done = processes.under_torchrun("experiments.dpo", "--run", tmp_path / "two", *command, n_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "margin", "kl", "heldout_loss", "heldout_margin"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), (name, a, b)


def test_what_is_wrong_is_named(inputs, other, tmp_path):
    """One line, no traceback, and no checkpoint."""
    write_inputs(tmp_path, ["abcd efgh"], ROWS)
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt": "x", "chosen": "y"}\n')
    (tmp_path / "same.jsonl").write_text(json.dumps(ROWS[0] | {"rejected": ROWS[0]["chosen"]}) + "\n")
    cases = [
        (("--train", tmp_path / "bad.jsonl"), "bad.jsonl, line 2: lacks 'rejected'"),
        (("--train", tmp_path / "same.jsonl"), "has no pair of answers that can be used"),
        (("--gamma", "1"), "gamma is 1.0: the loss dpo has none; its options are beta"),
        (("--loss", "robust", "--label-smoothing", "0.5"), "label_smoothing must be below 0.5"),
        (("--loss", "ipo", "--ld-alpha", "0.5"), "ld_alpha is 0.5: LD-DPO has the loss dpo, not ipo"),
        (("--beta", "0"), "beta must be above 0"),
        (("--chosen", "{answer}"), "line 1: has no text or number 'answer'"),
        (("--batch-size", "17"), "16 pairs of at most 16 tokens; batch_size is more"),
        (("--microbatches", "3"), "batch_size 8 is not divisible by 1 processes x 3 microbatches"),
        (("--resume",), "has no checkpoint to go on from"),
        (("--optim.alpha", "0.9"), "optim.alpha is 0.9: rmsprop has it, not adamw"),
        (("--reference", tmp_path / "weights"), "has another tokenizer than"),
        (("--reference", other, "--loss", "simpo"), "the loss simpo has none"),
        (("--reference", other, "--max-length", "32"), "max_length is 32: the reference's context_length is 24"),
    ]
    for flags, message in cases:
        said = run(inputs, tmp_path / "run", *flags, status=2)
        assert message in said and "Traceback" not in said, said
        assert not (tmp_path / "run").exists()
