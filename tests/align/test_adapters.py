"""The adapters of CS336's assignment 5 as the README of purelm.align has them: its code blocks, run.

Oracle of each: its definition in the course's handout, written out in float64 or token by token.
"""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purelm.align.graders import question_only, r1_zero
from purelm.align.logits import entropy, target_log_probs
from purelm.align.responses import packed_windows
from purelm.testing import check_op

README = (Path(__file__).resolve().parents[2] / "purelm/align/README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
A: dict = {}
for block in BLOCKS:
    exec(block, A)
# The names in tests/adapters.py of the course's two releases.
BOTH = {
    "run_tokenize_prompt_and_output", "run_get_response_log_probs", "run_compute_group_normalized_rewards",
    "run_compute_policy_gradient_loss", "get_packed_sft_dataset", "run_iterate_batches", "run_parse_mmlu_response",
    "run_parse_gsm8k_response", "run_compute_per_instance_dpo_loss",
}  # fmt: skip
NAMES = {
    "2025": BOTH | {
        "run_compute_entropy", "run_masked_mean", "run_masked_normalize", "run_sft_microbatch_train_step",
        "run_compute_naive_policy_gradient_loss", "run_compute_grpo_clip_loss", "run_grpo_microbatch_train_step",
    },
    "2026": BOTH | {"run_compute_rollout_rewards", "run_aggregate_loss_across_microbatch", "run_grpo_train_step"},
}  # fmt: skip
EXACT = dict(rtol=1e-12, atol=1e-12)  # float64


def test_the_table_names_every_adapter_of_both_years():
    """And what it does not call "not yet" is defined below it."""
    rows = re.findall(r"^\| `(\w+)` \| (yes)? ?\| (yes)? ?\| (.*) \|$", README, re.MULTILINE)
    for at, year in ((1, "2025"), (2, "2026")):
        assert {row[0] for row in rows if row[at]} == NAMES[year]
    assert {row[0] for row in rows if row[3] != "not yet"} == {*A} & (NAMES["2025"] | NAMES["2026"])
    assert len(re.findall("^```", README, re.MULTILINE)) == 2 * len(BLOCKS)


class Words:
    """A tokenizer of transformers' form: an id a word, and ids of its own around a text unless told otherwise."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def encode(self, text, add_special_tokens=True):
        ids = [10 + sum(map(ord, word)) for word in text.split()]
        return [self.bos_token_id, *ids] if add_special_tokens else ids


words = st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=5).map(" ".join)


pairs = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@given(pairs.filter(lambda pairs: any(len(f"{p} {o}".split()) > 1 for p, o in pairs)))
def test_tokenize_prompt_and_output(pairs):
    """Handout: rows of prompt and output ids padded on the right; input_ids without the last, labels without the
    first; the mask is 1 where a label is a token of the output."""
    tokenizer = Words()
    found = A["run_tokenize_prompt_and_output"]([p for p, _ in pairs], [o for _, o in pairs], tokenizer)
    encoded = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in pairs]
    longest = max(len(p) + len(o) for p, o in encoded)
    for b, (p, o) in enumerate(encoded):
        row = p + o + [0] * (longest - len(p) - len(o))
        of_output = [len(p) <= i < len(p) + len(o) for i in range(longest)]
        assert found["input_ids"][b].tolist() == row[:-1] and found["labels"][b].tolist() == row[1:]
        assert found["response_mask"][b].tolist() == of_output[1:]


def test_tokenize_prompt_and_output_by_transformers():
    """A real tokenizer of transformers, whose encode adds a token unless told not to; ids by its own call."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "[BOS]": 1, "a": 2, "b": 3}, "[PAD]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("[BOS] $A", None, [("[BOS]", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    found = A["run_tokenize_prompt_and_output"](["a", "a b"], ["b b", "a b"], tokenizer)
    assert found["input_ids"].tolist() == [[2, 3, 3], [2, 3, 2]]
    assert found["labels"].tolist() == [[3, 3, 0], [3, 2, 3]]
    assert found["response_mask"].tolist() == [[True, True, False], [False, True, True]]


def softmax(row):
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [w / math.fsum(weights) for w in weights]


LOGITS = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5


def test_entropy_and_log_probs():
    """-sum p log p and log p[label] with p = exp / sum exp, in Python's numbers."""
    labels = torch.tensor([[0, 6, 3], [2, 2, 5]])
    p = [[softmax(row.tolist()) for row in rows] for rows in LOGITS]
    exact = [[-math.fsum(x * math.log(x) for x in row) for row in rows] for rows in p]
    torch.testing.assert_close(A["run_compute_entropy"](LOGITS), torch.tensor(exact, dtype=torch.float64), **EXACT)
    chosen = [[math.log(p[b][t][int(labels[b, t])]) for t in range(3)] for b in range(2)]
    given_ids = torch.ones(2, 3, dtype=torch.int64)

    def model(ids):
        assert ids is given_ids
        return SimpleNamespace(logits=LOGITS)

    found = A["run_get_response_log_probs"](model, given_ids, labels, True)
    assert found.keys() == {"log_probs", "token_entropy"}
    torch.testing.assert_close(found["log_probs"], torch.tensor(chosen, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(found["token_entropy"], torch.tensor(exact, dtype=torch.float64), **EXACT)
    assert A["run_get_response_log_probs"](model, given_ids, labels, False).keys() == {"log_probs"}


def test_entropy_at_its_ends():
    """Large logits, a certain token, and excluded ones: log V of those left, 0, no nan, and a finite gradient."""
    V = 5
    for scale in (1.0, 1e4):
        assert entropy(torch.full((V,), scale)).item() == pytest.approx(math.log(V), rel=1e-6)
    assert entropy(torch.tensor([1e4, 0.0, -1e4])).item() == 0.0
    x = torch.tensor([1.0, -torch.inf, 1.0], requires_grad=True)
    entropy(x).backward()
    assert entropy(x).item() == pytest.approx(math.log(2)) and torch.isfinite(x.grad).all()
    assert entropy(torch.zeros(3, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="logits must be floating"):
        entropy(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape without V, \(2, 3\), got \(3,\)"):
        target_log_probs(LOGITS, torch.zeros(3, dtype=torch.int64))


def test_ops_of_logits_by_the_laws():
    """Gradients and transforms of both; references as written in the docstrings."""
    targets = torch.tensor([[0, 6, 3], [2, 2, 5]])
    laws = ["value", "gradient", "vmap", "jvp", "double_backward", "strides"]
    check_op(entropy, (LOGITS,), reference=lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), laws=laws)
    log_p = lambda x: torch.nn.functional.cross_entropy(x.movedim(-1, 1), targets, reduction="none").neg()  # noqa: E731
    check_op(lambda x: target_log_probs(x, targets), (LOGITS,), reference=log_p, laws=["value", "gradient", "jvp"])


MASK = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def kept(b):
    return [float(X[b, t]) for t in range(4) if MASK[b, t]]


def test_masked_mean_and_normalize():
    """Means and sums over the chosen elements; the mean of none is nan, by the course's contract."""
    for mask in (MASK, MASK.bool(), MASK.double()):
        rows = torch.tensor([math.fsum(kept(b)) for b in range(3)], dtype=torch.float64)
        counts = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(A["run_masked_mean"](X, mask, 1), rows / counts, **EXACT)
        torch.testing.assert_close(A["run_masked_mean"](X, mask), rows.sum() / 7, **EXACT)
        torch.testing.assert_close(A["run_masked_normalize"](X, mask, 1, 5.0), rows / 5, **EXACT)
        torch.testing.assert_close(A["run_masked_normalize"](X, mask, normalize_constant=5.0), rows.sum() / 5, **EXACT)
        torch.testing.assert_close(A["run_masked_normalize"](X, mask, dim=1), rows, **EXACT)
    assert A["run_masked_mean"](X, torch.zeros_like(MASK), 1).isnan().all()


@pytest.mark.parametrize("constant, accumulation", [(1.0, 1), (5.0, 3)])
def test_sft_microbatch_train_step(constant, accumulation):
    """L = -1/B sum_i 1/C sum_t m lp / accumulation; dL/dlp = -m / (B C accumulation), and calls add up."""
    log_probs = X.clone().requires_grad_()
    scale = 3 * constant * accumulation
    for call in range(1, 4):
        loss, metadata = A["run_sft_microbatch_train_step"](log_probs, MASK, accumulation, constant)
        assert loss.item() == pytest.approx(-math.fsum(x for b in range(3) for x in kept(b)) / scale, rel=1e-12)
        torch.testing.assert_close(log_probs.grad, -call * MASK.double() / scale, **EXACT)
        assert loss.shape == () and metadata == {}


def test_aggregate_loss_across_microbatch():
    """sequence: the mean over rows of their means; constant: the sum over the constant."""
    aggregate = A["run_aggregate_loss_across_microbatch"]
    means = [math.fsum(kept(b)) / len(kept(b)) for b in range(3)]
    assert aggregate(X, MASK).item() == pytest.approx(math.fsum(means) / 3, rel=1e-12)
    total = math.fsum(x for b in range(3) for x in kept(b))
    assert aggregate(X, MASK, "constant", 11).item() == pytest.approx(total / 11, rel=1e-12)


ROWS = [{"prompt": f"what is {n}", "response": "it {is} " + "so " * n} for n in range(1, 8)]


@pytest.fixture
def examples(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "prompt").write_text("### In:\n{instruction}\n\n### Out:\n{response}\n")
    monkeypatch.setitem(A, "ALPACA", tmp_path / "prompt")
    return tmp_path / "rows.jsonl"


def documents():
    tokenizer = Words()
    texts = [f"### In:\n{row['prompt']}\n\n### Out:\n{row['response']}" for row in ROWS]
    return [[1, *tokenizer.encode(text, add_special_tokens=False), 2] for text in texts]


def test_packed_sft_dataset(examples):
    """Windows of the concatenated documents: window k is ids[k T : (k + 1) T], its labels are one further on; no
    window without all its labels."""
    T = 8
    found = A["get_packed_sft_dataset"](Words(), examples, T, False)
    ids = [i for document in documents() for i in document]
    wanted = [(ids[at : at + T], ids[at + 1 : at + T + 1]) for at in range(0, len(ids), T) if at + T < len(ids)]
    assert [(x["input_ids"].tolist(), x["labels"].tolist()) for x in found] == wanted and len(wanted) > 5
    assert all(x.dtype == torch.int64 and x.shape == (T,) for row in found for x in row.values())
    shuffled = A["get_packed_sft_dataset"](Words(), examples, T, True)
    stream = [i for x in shuffled for i in x["input_ids"].tolist()]
    begins = [i for i, x in enumerate(stream) if x == 1]
    starts = [tuple(stream[i:j]) for i, j in pairwise(begins)]
    assert len(shuffled) == len(found) and starts != [tuple(d) for d in documents()][: len(starts)]
    assert {*starts} <= {tuple(d) for d in documents()}  # documents stay whole


@pytest.mark.parametrize("n_total", range(2, 12))
def test_windows_of_every_length(n_total):
    """By hand: floor((n - 1) / T) windows."""
    ids = list(range(n_total))
    for T in range(1, n_total):
        rows = packed_windows([ids[:1], [], ids[1:]], T)
        assert rows["tokens"].tolist() == [ids[k * T : k * T + T] for k in range((n_total - 1) // T)]
        assert torch.equal(rows["targets"], rows["tokens"] + 1)


def test_windows_refuse():
    for call, message in [
        (lambda: packed_windows([[1, 2]], 2), "2 tokens, and a window and its targets take 3"),
        (lambda: packed_windows([], 2), "0 tokens"),
        (lambda: packed_windows([[1, 2]], 0), "context_length must be"),
        (lambda: packed_windows([[1], [1.5]], 1), r"documents\[1\]: ids must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_iterate_batches(examples):
    """One epoch: every example once, in order or not, and ceil(n / size) batches."""
    dataset = A["get_packed_sft_dataset"](Words(), examples, 6, False)
    for size in (1, 4, len(dataset), 100):
        for shuffle in (False, True):
            batches = A["run_iterate_batches"](dataset, size, shuffle)
            assert [len(b["labels"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
            assert len(batches) == math.ceil(len(dataset) / size)
            for name in ("input_ids", "labels"):
                rows = torch.cat([b[name] for b in batches]).tolist()
                given_rows = [x[name].tolist() for x in dataset]
                assert sorted(rows) == sorted(given_rows) and (rows == given_rows) is not shuffle


def test_answers():
    """What the course's two tests ask for, and what the handout says of answers without one."""
    example = {"subject": "virology", "question": "?", "options": ["1", "10", "100", "10000"], "answer": "B"}
    parse = A["run_parse_mmlu_response"]
    assert parse(example, "The correct answer is B. There is only one of them.") == "B"
    assert parse(example, "The correct answer is 10000 polyomaviruses.") is None
    number = A["run_parse_gsm8k_response"]
    assert number("She sold 48/2 = 24 in May, so 48 + 24 = 72 altogether, 72.") == "72"
    assert number("She sold some in May.") is None


def test_rollout_rewards():
    """Rewards in order, and means of each part, with the graders of the course's names."""
    responses = ["</think> <answer>5</answer>", "</think> <answer>6</answer>", "5"]
    raw, metadata = A["run_compute_rollout_rewards"](r1_zero, responses, ["5"] * 3)
    assert raw.tolist() == [1.0, 0.0, 0.0]
    assert metadata == {"format_reward": 2 / 3, "answer_reward": 1 / 3, "reward": 1 / 3}
    raw, _ = A["run_compute_rollout_rewards"](question_only, [r"\boxed{5}", "5"], ["5", "5"])
    assert raw.tolist() == [1.0, 0.0]


REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)


def test_group_normalized_rewards():
    """Oracle: each group by hand, with the unbiased deviation."""
    groups = REWARDS.view(2, 3)
    centred = groups - groups.mean(1, keepdim=True)
    deviation = (centred.square().sum(1, keepdim=True) / 2).sqrt()
    f = A["run_compute_group_normalized_rewards"]
    for options, expected in (
        ({}, centred / (deviation + 1e-6)),
        ({"advantage_normalizer": "none"}, centred),
        ({"advantage_normalizer": "mean", "advantage_eps": 0.0}, centred / groups.mean(1, keepdim=True)),
        ({"baseline": "none"}, groups),
    ):
        torch.testing.assert_close(f(REWARDS, 3, **options)[0], expected.flatten(), **EXACT)
    reward_fn = lambda text, gold: {"reward": float(text == gold), "format_reward": 1.0}  # noqa: E731
    for by_std, expected in ((True, 2**-0.5), (False, 0.5)):
        found, raw, means = A["run_compute_group_normalized_rewards_2025"](reward_fn, "ab", "ac", 2, 1e-6, by_std)
        assert found.tolist() == pytest.approx([expected, -expected], rel=1e-5)
        assert raw.tolist() == [1, 0] and means == {"reward": 0.5, "format_reward": 1.0}


def _policy(seed=0):
    g = torch.Generator().manual_seed(seed)
    lp, old = (-torch.rand(6, 5, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 5]).unsqueeze(-1)
    return lp.requires_grad_(), old, mask


@pytest.mark.parametrize("method", ["none", "noclip", "grpo", "gspo"])
def test_policy_gradient_losses(method):
    """Oracle: the formulas of the handouts, token by token."""
    lp, old, mask = _policy()
    lp = lp.detach()
    losses, _ = A["run_compute_policy_gradient_loss"](REWARDS, lp, method, old, 0.2, mask)
    for i in range(6):
        T = int(mask[i].sum())
        for t in range(T):
            w = math.exp(float(lp[i, t] - old[i, t]))
            if method == "gspo":
                w = math.exp(sum(float(lp[i, s] - old[i, s]) for s in range(T)) / T)
            a, clipped = float(REWARDS[i]), min(max(w, 0.8), 1.2)
            expected = {"none": -a * float(lp[i, t]), "noclip": -w * a}.get(method, -min(w * a, clipped * a))
            assert float(losses[i, t]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline", "grpo_clip"])
def test_a_microbatch_of_2025(loss_type):
    """Oracle: autograd through the mean over rows of the mean over tokens, divided by the number of microbatches."""
    lp, old, mask = _policy(1)
    advantages, raw = (REWARDS - 0.5).unsqueeze(-1), REWARDS.unsqueeze(-1)
    loss, _ = A["run_grpo_microbatch_train_step"](lp, mask, 4, loss_type, raw, advantages, old, 0.1)
    own = lp.detach().requires_grad_()
    w = (own - old).exp()
    each = {
        "no_baseline": -raw * own,
        "reinforce_with_baseline": -advantages * own,
        "grpo_clip": -torch.minimum(w * advantages, w.clamp(0.9, 1.1) * advantages),
    }[loss_type]
    expected = ((each * mask).sum(1) / mask.sum(1)).mean() / 4
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(lp.grad, torch.autograd.grad(expected, own)[0], **EXACT)
    losses, _ = A["run_compute_policy_gradient_loss_2025"](own, loss_type, raw, advantages, old, 0.1)
    torch.testing.assert_close(losses, each, **EXACT)


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(400, 400, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, ids):
        return SimpleNamespace(logits=self.table[ids % 400])


@pytest.mark.parametrize("normalization", [("sequence", None), ("constant", 24)])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_train_step_of_2026(normalization, steps):
    """Oracle: the whole batch at once, by autograd and plain SGD."""
    prompts = ["a b", "a b", "c", "c", "d e f", "d e f"]
    answers = ["x", "y z", "u v w", "x", "y", "z z"]
    golds = ["x", "x", "x", "x", "y", "y"]
    reward_fn = lambda text, gold: {"reward": float(text == gold)}  # noqa: E731
    tokenizer = SimpleNamespace(pad_token_id=0, encode=lambda text, **_: [ord(c) for c in text.replace(" ", "")])
    model = Table()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss, found = A["run_grpo_train_step"](
        model, tokenizer, optimizer, steps, None, reward_fn, prompts, answers, golds, 2,
        loss_normalization=normalization[0], normalization_constant=normalization[1],
    )  # fmt: skip
    assert found["reward"] == 0.5
    own = Table().table
    total = 0.0
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        pair = [float(answers[j] == golds[j]) for j in (i - i % 2, i - i % 2 + 1)]
        centred = float(answer == golds[i]) - sum(pair) / 2
        advantage = centred / (abs(pair[0] - pair[1]) / math.sqrt(2) + 1e-6)
        ids = tokenizer.encode(prompt + answer)
        log_p = [own[a].log_softmax(-1)[b] for a, b in pairwise(ids)][-len(answer.replace(" ", "")) :]
        n = len(log_p) * 6 if normalization[0] == "sequence" else normalization[1]
        total = total - advantage * sum(log_p) / n
    expected = torch.autograd.grad(total, own)[0]
    # Rewards are fp32, and so are advantages.
    assert float(loss) == pytest.approx(float(total.detach()), abs=1e-6)
    torch.testing.assert_close(model.table.detach(), (own - expected).detach(), rtol=0, atol=1e-6)


class Bigrams(torch.nn.Module):
    """logits_t = a row of a table, chosen by the token at t."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(2000, 2000, generator=generator, dtype=torch.float64))

    def forward(self, ids):
        return SimpleNamespace(logits=self.table[ids])


def test_per_instance_dpo_loss(tmp_path, monkeypatch):
    """-log s(b (d_w - d_l)) in Python's numbers, from bigram log-probabilities of the answers alone: the prompt's
    cancel, and the end token counts. The gradient: -b s(-b d) at the chosen answer's first token."""
    (tmp_path / "prompt").write_text("### In:\n{instruction}\n\n### Out:\n{response}\n")
    monkeypatch.setitem(A, "ALPACA", tmp_path / "prompt")
    lm, ref = Bigrams(0), Bigrams(1)
    tokenizer, beta = Words(), 0.5
    loss = A["run_compute_per_instance_dpo_loss"](lm, ref, tokenizer, beta, "what is", "yes so", "no idea at all")

    def total(model, answer):
        ids = [*tokenizer.encode(f"Out:\n{answer}", add_special_tokens=False), tokenizer.eos_token_id]
        rows = model.table.detach()
        return math.fsum(math.log(softmax(rows[i].tolist())[j]) for i, j in pairwise(ids))

    d = math.fsum(sign * (total(lm, x) - total(ref, x)) for sign, x in ((1, "yes so"), (-1, "no idea at all")))
    assert loss.shape == () and loss.item() == pytest.approx(math.log(1 + math.exp(-beta * d)), rel=1e-9)
    loss.backward()
    out, yes, no = (tokenizer.encode(x)[1] for x in ("Out:", "yes", "no"))
    share = 1 / (1 + math.exp(beta * d))
    assert lm.table.grad[out, yes].item() == pytest.approx(-beta * share, rel=1e-9)
    assert lm.table.grad[out, no].item() == pytest.approx(beta * share, rel=1e-9) and ref.table.grad is None
