"""experiments.sft end to end: a small model of our own as open weights, fine-tuned, resumed, exported.

Oracles: the uninterrupted run, to the last bit; transformers, for what is exported; the data, for what is learned.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.open_model import open_model
from experiments.pairs import Example, Pair, batch_maker, batch_of, read_chats, read_examples
from purelm import checkpoint, random, tree
from purelm.models import hf, transformer
from purelm.tokenizer import decode, encode, token_to_id
from purelm.tokenizer.chat import Chat, encode_chat, find_chat, load_chat
from tests.dist import processes
from tests.dist.processes import ENVIRONMENT
from tests.experiments.small_model import END, write_inputs

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
FLAGS = [
    "--prompt", "{question}", "--response", " {answer}", "--batch-size", "8", "--max-length", "16", "--device", "cpu",
    "--optim.lr", "1e-2", "--optim.warmup-steps", "2", "--max-new-tokens", "6", "--compute", "fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with weights/, train.jsonl and heldout.jsonl."""
    lines = [f"{r['question']} {r['answer']}" for r in ROWS]
    return write_inputs(tmp_path_factory.mktemp("sft"), lines, ROWS, "train", "heldout")


def sft(inputs, run, *flags, status=0, given=FLAGS):
    command = [sys.executable, "-m", "experiments.sft", "--run", str(run), "--model", str(inputs / "weights"),
               "--train", str(inputs / "train.jsonl"), "--heldout", str(inputs / "heldout.jsonl")]  # fmt: skip
    done = subprocess.run([*command, *given, *flags], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
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
    assert (tmp_path / "run/report.html").read_text().count("[wanted]") == 12
    assert (tmp_path / "run/curves.png").stat().st_size > 1000
    ids = torch.from_numpy(encode(bpe, "1 + 2 =").astype("int64"))[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export", attn_implementation="eager").eval()
    torch.testing.assert_close(transformer.apply(params, ids, cfg), theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), marks=pytest.mark.slow, id="all"),
        pytest.param(("--packing", "--batch-size", "2"), marks=pytest.mark.slow, id="packing"),
        ("--lora.rank", "4", "--microbatches", "2"),
    ],
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
    if "--lora.rank" in flags:
        with pytest.raises(ValueError, match=r"hold low-rank updates alone: give the whole model, .*part/export"):
            open_model(tmp_path / "part", None, torch.device("cpu"))
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


def test_generations_are_graded(inputs, tmp_path):
    """Oracles: int() of both texts; the entropy of softmax of the logits, by its definition."""
    sft(inputs, tmp_path / "run", "--steps", "30", "--eval-every", "0", "--generations", "5", "--grade", "number")
    made = [r for r in rows(tmp_path / "run/generations.jsonl") if r["step"] == 30]
    assert [r["gold"] for r in made] == [f" {row['answer']}" for row in ROWS[:5]]
    for r in made:
        digits = [word for word in r["response"].split() if word.isdigit()]
        assert r["reward"] == float(bool(digits) and int(digits[-1]) == int(r["gold"])), r
    (last,) = [r for r in rows(tmp_path / "run/metrics.jsonl") if r["step"] == 30 and "heldout_loss" in r]
    for name, key in (("reward", "reward"), ("heldout_tokens", "n_tokens"), ("heldout_entropy", "entropy")):
        assert last[name] == pytest.approx(sum(r[key] for r in made) / 5)
    params, cfg, bpe = hf.load(tmp_path / "run/export")
    row = made[0]
    prompt, response = encode(bpe, row["prompt"]).tolist(), encode(bpe, row["response"]).tolist()
    response += [token_to_id(bpe, END)] * (row["finish_reason"] == "stop_id")
    logits = transformer.apply(params, torch.tensor([prompt + response]), cfg)[0, len(prompt) - 1 : -1].double()
    p = torch.softmax(logits, -1)
    # Five decimals are written.
    assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-4)
    assert "grade: responses to held-out prompts" in sft(
        inputs, tmp_path / "other", "--grade", "number", "--generations", "0", status=2
    )


def test_conversations(inputs, tmp_path):
    """All answers are trained, by the model's template. Oracles: ids put together by hand; a prompt that is asked."""
    params, cfg, bpe = hf.load(inputs / "weights")
    chat = Chat("{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }} {% endfor %}"
                "{% if add_generation_prompt %}assistant:{% endif %}", None, END)  # fmt: skip
    messages = [
        {"role": "user", "content": f"1{END}"}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"},
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    stop = token_to_id(bpe, END)
    (x,) = read_chats(tmp_path / "chats.jsonl", bpe, chat, gold="", ends=[stop], max_length=99, overlong="error")
    assert x.ids.tolist() == encode_chat(bpe, chat, messages, False).tolist()
    assert decode(bpe, x.ids[x.mask].tolist()) == f"2{END}4{END}"
    assert decode(bpe, x.prompt.tolist()).endswith("user:3<|endoftext|> assistant:")
    assert x.ids.tolist().count(stop) == 4  # the user's is text
    (y,) = read_chats(tmp_path / "chats.jsonl", bpe, chat, gold="", ends=[stop], max_length=len(x.ids) - 2,
                      overlong="truncate")  # fmt: skip
    assert y.ids.tolist() == x.ids[:-2].tolist() and y.mask.tolist() == x.mask[:-2].tolist()

    weights = tmp_path / "weights"
    hf.save(weights, params, cfg, bpe, chat=chat)
    talk = [{"messages": [{"role": "user", "content": r["question"]},
                          {"role": "assistant", "content": str(r["answer"])}]} for r in ROWS]  # fmt: skip
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, talk)) + "\n")
    flags = ["--steps", "60", "--chat", "--max-length", "32", "--grade", "exact", "--generations", "16"]
    given = FLAGS[4:]  # without the templates of prompt and response
    sft(tmp_path, tmp_path / "run", *flags, given=given)
    made = [r for r in rows(tmp_path / "run/generations.jsonl") if r["step"] == 60]
    assert [r["wanted"] for r in made] == [str(r["answer"]) for r in ROWS]
    assert sum(r["reward"] for r in made) >= 13 and {r["finish_reason"] for r in made} == {"stop_id"}
    assert load_chat(tmp_path / "run/export") == chat
    (tmp_path / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    assert "train.jsonl, line 1: messages: none is the assistant's" in sft(
        tmp_path, tmp_path / "other", *flags, status=2, given=given
    )
    assert "has no chat template" in sft(inputs, tmp_path / "other", *flags, status=2, given=given)


def _examples(n, seed=0):
    draw = np.random.default_rng(seed)
    ids = [(draw.integers(1, 99, draw.integers(1, 9)), draw.integers(1, 99, draw.integers(1, 9))) for _ in range(n)]
    return [
        Example(Pair([], [], []), np.concatenate([p, r]), np.arange(len(p) + len(r)) >= len(p), len(p)) for p, r in ids
    ]


@pytest.mark.parametrize("packed", [None, 20])
def test_every_example_once_an_epoch(packed):
    """Oracle: the responses themselves; within an epoch each is a target once, whatever the rows are."""
    examples = _examples(23)
    n_rows, batch = batch_maker(examples, 1, 5, 0, packed=packed)
    epochs = []
    for epoch in range(2):
        targets: Counter = Counter()
        for i in range(epoch * n_rows, (epoch + 1) * n_rows):
            made = batch(i)
            assert packed is None or made["tokens"].shape == (1, packed)
            targets.update(made["targets"][made["weights"] == 1].tolist())
        assert targets == Counter(int(t) for x in examples for t in x.ids[x.mask])
        epochs.append([batch(i)["tokens"].tolist() for i in range(epoch * n_rows, (epoch + 1) * n_rows)])
    assert epochs[0] != epochs[1]
    if packed is None:
        assert n_rows == 23
    else:
        assert sorted(map(str, epochs[0])) == sorted(map(str, epochs[1])) and n_rows < 15
    wide, _ = batch_maker(examples, 4, 5, 0, packed=packed)
    assert wide == n_rows


def test_packed_rows_have_the_loss_of_their_examples():
    """Oracle: the batch in which each example is a row. fp64: what is left is the order of sums."""
    examples = _examples(9, 1)
    cfg = transformer.Config(99, 32, 16, 2, 2)
    params = transformer.init(random.key(0), cfg, dtype=torch.float64)
    n_rows, _ = batch_maker(examples, 1, 0, 0, packed=24)
    packed = batch_maker(examples, n_rows, 0, 0, packed=24)[1](0)
    plain = batch_of(examples, 0, torch.device("cpu"))
    assert "segment_ids" in packed and packed["tokens"].numel() < plain["tokens"].numel()
    a, b = (transformer.loss(params, x, cfg)[0] for x in (packed, plain))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--parallel.mode", "ddp", "--lora.rank", "2"), ("--parallel.mode", "fsdp")])
def test_two_processes_train_as_one(inputs, tmp_path, flags):
    """Oracle: one process. fp32 sums in another order: 1e-4 of the loss after four steps. Either resumes the other."""
    common = ["--steps", "4", "--optim.schedule", "constant", "--eval-every", "2", "--grade", "exact", *flags]
    sft(inputs, tmp_path / "one", *common)
    command = ["--model", inputs / "weights", "--train", inputs / "train.jsonl", "--heldout", inputs / "heldout.jsonl",
               *FLAGS, *common]  # fmt: skip
    done = processes.under_torchrun("experiments.sft", "--run", tmp_path / "two", *command, n_ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [sorted(r) for r in one] == [sorted(r) for r in two] and len(one) == 7
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "n_targets", "heldout_loss", "heldout_entropy", "grad_norm"} & set(a):
            assert b[name] == pytest.approx(a[name], rel=1e-3 if name == "grad_norm" else 1e-4), (name, a, b)
    generations = [[r["prompt"] for r in rows(tmp_path / name / "generations.jsonl")] for name in ("one", "two")]
    assert generations[0] == generations[1]
    common[1] = "5"
    sft(inputs, tmp_path / "two", *common, "--resume")
    assert rows(tmp_path / "two/metrics.jsonl")[-1]["step"] == 5


def test_special_tokens_are_the_templates_alone(inputs):
    """Oracle: ids looked up by hand. In the data they are text, so that no example ends itself."""
    _, _, bpe = hf.load(inputs / "weights")
    (inputs / "odd.jsonl").write_text(json.dumps({"question": f"a{END}", "answer": f"{END}1"}) + "\n")
    options = dict(gold="{answer}", before=[], after=[7], max_length=99, overlong="error")
    (x,) = read_examples(inputs / "odd.jsonl", bpe, f"{END}{{question}}", "{answer}", **options)
    stop = token_to_id(bpe, END)
    response = x.ids[x.mask].tolist()
    assert x.prompt.tolist() == [stop, *encode(bpe, f"a{END}", None).tolist()]
    assert response == [*encode(bpe, f"{END}1", None).tolist(), 7]
    assert x.prompt.tolist().count(stop) == 1 and stop not in response


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
        (("--chat",), "chat: the template writes the conversation: leave out --prompt, --response and --begin"),
        (("--lora.rank", "999"), "rank 999 is more than the shorter side of layers.0.attn"),
    ]  # fmt: skip
    for flags, message in cases:
        said = sft(inputs, tmp_path / "run", *flags, status=2)
        assert message in said and "Traceback" not in said, said
        assert not (tmp_path / "run" / "checkpoints").exists()
