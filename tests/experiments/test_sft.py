"""experiments.sft end to end: a small model of our own as open weights, fine-tuned, resumed, exported.

Oracles: the uninterrupted run, to the last bit; transformers, for what is exported; the data, for what is learned.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.pairs import read_examples
from purelm import checkpoint, random, tree
from purelm.models import hf, transformer
from purelm.tokenizer import encode, token_to_id, train
from purelm.tokenizer.chat import Chat, find_chat, load_chat
from tests.dist.processes import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
ROWS = [{"question": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
FLAGS = [
    "--prompt", "{question}", "--response", " {answer}", "--batch-size", "8", "--max-length", "16", "--device", "cpu",
    "--optim.lr", "1e-2", "--optim.warmup-steps", "2", "--max-new-tokens", "6", "--compute", "fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with weights/, train.jsonl and heldout.jsonl."""
    folder = tmp_path_factory.mktemp("sft")
    text = folder / "text"
    text.write_text("\n".join(f"{r['question']} {r['answer']}" for r in ROWS) * 4)
    bpe = train(text, 280, [END])
    cfg = transformer.Config(288, 32, 32, 2, 4, n_kv_heads=2, rope_layout="half")
    hf.save(folder / "weights", transformer.init(random.key(0), cfg), cfg, bpe)
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return folder


def sft(inputs, run, *flags, status=0):
    command = [sys.executable, "-m", "experiments.sft", "--run", str(run), "--model", str(inputs / "weights"),
               "--train", str(inputs / "train.jsonl"), "--heldout", str(inputs / "heldout.jsonl")]  # fmt: skip
    done = subprocess.run([*command, *FLAGS, *flags], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_exports(inputs, tmp_path):
    """Sums of two digits: nearly all of the loss goes, and greedy answers are right; the export is that model."""
    from transformers import AutoModelForCausalLM

    sft(inputs, tmp_path / "run", "--steps", "60", "--eval-every", "30", "--generations", "16")
    losses = [r["heldout_loss"] for r in rows(tmp_path / "run/metrics.jsonl") if "heldout_loss" in r]
    assert len(losses) == 3 and losses[-1] < 0.1 * losses[0]
    generations = rows(tmp_path / "run/generations.jsonl")
    assert {r["step"] for r in generations} == {0, 30, 60}
    last = [r for r in generations if r["step"] == 60]
    assert len(last) == 16 and sum(r["response"] == r["wanted"] for r in last) >= 14
    assert {r["finish_reason"] for r in last} <= {"stop_id", "length"}
    params, cfg, bpe = hf.load(tmp_path / "run/export")
    ids = torch.from_numpy(encode(bpe, "1 + 2 =").astype("int64"))[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", attn_implementation="eager").eval()
    torch.testing.assert_close(transformer.apply(params, ids, cfg), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flags", [pytest.param((), marks=pytest.mark.slow, id="all"), ("--lora.rank", "4", "--microbatches", "2")]
)
def test_resumed_is_uninterrupted(inputs, tmp_path, flags):
    """Oracle: the run of 6 steps without a break, to the last bit."""
    sft(inputs, tmp_path / "whole", "--steps", "6", "--optim.schedule", "constant", *flags)
    sft(inputs, tmp_path / "part", "--steps", "3", "--optim.schedule", "constant", *flags)
    assert "resumed from step 3" in sft(
        inputs, tmp_path / "part", "--steps", "6", "--optim.schedule", "constant", "--resume", *flags
    )
    a, b = (checkpoint.load(tmp_path / name / "checkpoints", 6)[0] for name in ("whole", "part"))
    assert tree.structure(a) == tree.structure(b)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    if flags:
        assert tree.n_params(a["params"]) < 20_000 and all(".a" in p or ".b" in p for p in tree.paths(a["params"]))


def test_the_export_has_the_models_chat_template(inputs, tmp_path):
    """And none whose tokens the tokenizer lacks, which is said. Oracle: load_chat on both folders."""
    params, cfg, bpe = hf.load(inputs / "weights")
    chat = Chat("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", None, END)
    folder = tmp_path / "inputs"
    hf.save(folder / "weights", params, cfg, bpe, chat=chat)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(inputs / name, folder)
    sft(folder, tmp_path / "run", "--steps", "1")
    assert load_chat(tmp_path / "run/export") == chat
    (folder / "weights/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    said = sft(folder, tmp_path / "other", "--steps", "1")
    assert "export/ will have no chat template: its eos_token '</s>' is no special token" in said
    assert find_chat(tmp_path / "other/export") is None


def test_going_on_writes_rows_once_and_exports_again(inputs, tmp_path):
    """Rows after the checkpoint and of a run that never saved are gone; export/ is the newest parameters; the run
    itself is one that experiments.generate continues."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 9, "loss": 0.0}\n')
    sft(inputs, run, "--steps", "2", "--optim.schedule", "constant")
    first, _ = hf.load_weights(run / "export")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')  # killed after the checkpoint, within a row
    sft(inputs, run, "--steps", "3", "--optim.schedule", "constant", "--resume")
    found = rows(run / "metrics.jsonl")
    assert [r["step"] for r in found if "loss" in r] == [1, 2, 3] and all(r.get("loss", 1.0) > 0 for r in found)
    assert [r["step"] for r in found if "heldout_loss" in r] == [0, 2, 3]
    assert {r["step"] for r in rows(run / "generations.jsonl")} == {0, 2, 3}
    second, _ = hf.load_weights(run / "export")
    params = checkpoint.load(run / "checkpoints", 3, only=["params"])[0]["params"]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(second), tree.leaves(params), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(tree.leaves(first), tree.leaves(second), strict=True))
    done = subprocess.run(
        [sys.executable, "-m", "experiments.generate", str(run), "--prompt", "1 + 2 =", "--max-new-tokens", "3"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("1 + 2 ="), done.stderr
    # Another model, or other data, under the same names.
    other = tmp_path / "weights"
    _, cfg, bpe = hf.load(inputs / "weights")
    hf.save(other, transformer.init(random.key(1), cfg), cfg, bpe)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS[::-1])) + "\n")
    for flags, name in ((("--model", str(other)), "model"), (("--train", str(tmp_path / "data.jsonl")), "train")):
        said = sft(
            inputs, run, "--steps", "4", "--optim.schedule", "constant", "--resume", *flags, status=2
        )
        assert f"--resume: {name} (its content) " in said and "is not that of the checkpoint" in said, said


def test_special_tokens_are_the_templates_alone(inputs):
    """Oracle: ids looked up by hand. In the data they are text, so that no example ends itself."""
    _, _, bpe = hf.load(inputs / "weights")
    (inputs / "odd.jsonl").write_text(json.dumps({"question": f"a{END}", "answer": f"{END}1"}) + "\n")
    options = dict(before=[], after=[7], max_length=99, overlong="error")
    (x,) = read_examples(inputs / "odd.jsonl", bpe, f"{END}{{question}}", "{answer}", **options)
    stop = token_to_id(bpe, END)
    assert x.prompt.tolist() == [stop, *encode(bpe, f"a{END}", None).tolist()]
    assert x.response.tolist() == [*encode(bpe, f"{END}1", None).tolist(), 7]
    assert x.prompt.tolist().count(stop) == 1 and stop not in x.response


def test_what_is_wrong_is_named(inputs, tmp_path):
    """One line, no traceback, and nothing in the run's folder but its lock."""
    lines = (inputs / "train.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:3], '{"question": "x"}']) + "\n")
    cases = [
        (("--train", str(tmp_path / "bad.jsonl")), "bad.jsonl, line 4: has no text or number 'answer'; its fields"),
        (("--end", "<|im_end|>"), "end: the tokenizer has no special token '<|im_end|>'; it has <|endoftext|>"),
        (("--max-length", "64"), "max_length is 64: the model's context_length is 32"),
        (("--max-length", "4", "--overlong", "error"), "example 0 has"),
        (("--resume",), "has no checkpoint to go on from"),
        (("--model", str(tmp_path / "none")), "none: no such folder; nothing is downloaded here"),
        (("--batch-size", "0"), "batch_size must be"),
        (("--lora.rank", "4", "--optim.name", "muon"), "optim.name is muon: low-rank updates are trained by adamw"),
        (("--lora.rank", "999"), "rank 999 is more than the shorter side of layers.0.attn"),
    ]  # fmt: skip
    for flags, message in cases:
        said = sft(inputs, tmp_path / "run", *flags, status=2)
        assert message in said and "Traceback" not in said, said
        assert not (tmp_path / "run" / "checkpoints").exists()
