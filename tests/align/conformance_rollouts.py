"""Rows of the conformance table about samplers, data and graders."""

import re
import signal
import threading
from functools import cache

import numpy as np
import torch

from purelm import random, tree
from purelm.align.graders import Grader, gsm8k, last_number
from purelm.align.graders.extract import gsm8k_gold
from purelm.align.responses import packed_responses, response_batch
from purelm.align.rollouts import of_generation, rollout_batch
from purelm.generate import Sampling, generate
from purelm.generate.stops import STOP_STRING, stopped, text_of
from purelm.generate.types import Generation
from purelm.models import transformer
from tests.align.conformance import Case, Row

CFG = transformer.Config(vocab_size=11, context_length=24, d_model=16, n_layers=2, n_heads=2)
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@cache
def weights(seed: int):
    """Parameters with probabilities far from uniform, so that a mistake is seen."""
    params = transformer.init(random.key(seed), CFG, dtype=torch.float64)
    return {**params, "lm_head": tree.map(lambda w: 20 * w, params["lm_head"])}


def gap(sampled_with: int, trained_with: int) -> float:
    """The largest |log-probability of the sampler - of the trainer| over sampled tokens."""
    model = transformer.make(CFG)
    out = generate(model, weights(sampled_with), PROMPTS, random.key(1), max_new_tokens=6, n_samples=2)
    batch = rollout_batch(of_generation(PROMPTS, out, [0.0] * 6, n_samples=2), pad_id=0)
    sampler = batch.pop("sampler_log_probs").double()
    return float((model.log_probs(weights(trained_with), batch)[0].double() - sampler).abs().max())


def retokenised() -> Case:
    """A vocabulary of a, b and ab; a and b are sampled, and decoded and encoded they are ab."""
    vocabulary = ["a", "b", "ab"]
    out = Generation(
        [torch.tensor([0, 1])], [torch.tensor([-1.0, -1.0])], ["length"], ["ab"], [torch.tensor([-1.0, -1.0])]
    )
    batch = rollout_batch(of_generation([[0]], out, [1.0], n_samples=1), pad_id=0)
    again = [vocabulary.index("".join(vocabulary[i] for i in out.tokens[0].tolist()))]
    return Case(batch["targets"][batch["weights"] > 0].tolist(), [0, 1], again)


def stale() -> Case:
    """Sampled after an update, with the weights of before it."""
    return Case(gap(1, 1), 0.0, gap(0, 1), 1e-5)


def padded() -> Case:
    """The next token's log-probabilities after [4], alone and beside a prompt of five tokens."""
    model, params = transformer.make(CFG), weights(0)
    alone = generate(model, params, [[4]], random.key(1), max_new_tokens=1, sampling=GREEDY)
    beside = generate(model, params, [[4], [5, 6, 7, 8, 9]], random.key(1), max_new_tokens=1, sampling=GREEDY)
    assert torch.equal(alone.tokens[0], beside.tokens[0])
    target = {"targets": torch.tensor([5 * [int(alone.tokens[0][0])]])}
    left = model.log_probs(params, {"tokens": torch.tensor([[0, 0, 0, 0, 4]]), **target})[0][0, -1]
    of_alone = float(alone.model_logprobs[0][0])
    return Case(float(beside.model_logprobs[0][0]) - of_alone, 0.0, abs(float(left) - of_alone), 1e-6)


def packed() -> Case:
    """The loss of two pairs in one row, less the loss of both alone."""
    prompts, responses = [[1, 2], [3]], [[4, 5], [6, 7, 8]]
    (row,) = packed_responses(prompts, responses, 9, pad_id=0)
    row = {name: torch.from_numpy(np.array(x))[None] for name, x in row.items()}
    loss = lambda batch: float(transformer.loss(weights(0), batch, CFG)[0])  # noqa: E731
    alone = loss(response_batch(prompts, responses, pad_id=0))
    without = {name: x for name, x in row.items() if name != "segment_ids"}
    return Case(loss(row) - alone, 0.0, abs(loss(without) - alone), 1e-5)


def masked_pack() -> Case:
    """Tokens that are trained, of pairs of 2 + 2 and 1 + 3 tokens in one row."""
    (row,) = packed_responses([[1, 2], [3]], [[4, 5], [6, 7, 8]], 9, pad_id=0)
    return Case(int(row["weights"].sum()), 5, int((row["targets"] > 0).sum()))


def off_the_main_thread() -> Case:
    """1/2 against 0.5, in a thread."""
    found: list[bool] = []

    def by_signal() -> bool:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        except ValueError:  # "signal only works in main thread"
            return False
        return True

    def run() -> None:
        with Grader() as grader:
            found.extend([grader.equal("1/2", "0.5").equal, by_signal()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return Case(found[0], True, found[1])


def comma() -> Case:
    """The number in a text in which a comma follows it."""
    text = "72 clips, altogether."
    return Case(last_number(text), "72", re.findall(r"[0-9,]+(?:\.[0-9]+)?", text)[-1].replace(",", ""))


def sign() -> Case:
    """The gold answer after ####."""
    return Case(gsm8k_gold("2 - 5 = -3\n#### -3"), "-3", re.search(r"#### \D*(\d+)", "#### -3")[1])


def run_on() -> Case:
    """A right answer after which the model asks itself a new question."""
    text = "9 * 2 = 18\n#### 18\n\nQuestion: Tom has 5 apples."
    strings = ("Question:",)

    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))

    ids = [ord(c) for c in text]
    end = next(n for n in range(1, len(ids) + 1) if stopped(decode, ids[:n], strings))
    stopped_text = text_of(decode, ids[:end], STOP_STRING, strings)
    return Case(gsm8k(stopped_text, "#### 18").equal, True, gsm8k(text, "#### 18").equal)


ROWS = [
    Row("assignment5-alignment#15, slime PR#117", "decoded and encoded again, ids change", "a, b, where ab is a token",
        "rollout_batch", retokenised),
    Row("trl#5312, trl#7198, trl#3024, NeMo-RL PR#4018, SkyRL#2246", "sampled with weights or a cache of before",
        "sampled after an update: largest gap", "generate(model, params)", stale, "above 0.01"),
    Row("transformers#25420", "left padding and the cache change logits", "[4] beside a longer prompt: gap",
        "generate", padded, "above 0.01"),
    Row("functionary#265", "packed pairs see each other", "two pairs in a row: loss less that of both",
        "packed_responses", packed, "above 0.01"),
    Row("trl#3728", "packing loses the mask of what is trained", "answers of 2 and 3 tokens in a row: trained",
        "packed_responses", masked_pack),
    Row("Math-Verify#50, #55, verl PR#5635, trl PR#5281", "0 off the main thread (time limits by signals)",
        "1/2 = 0.5 in a thread", "Grader", off_the_main_thread),
    Row("omlx#3484", "a comma read as a number", '"72 clips, altogether."', "last_number", comma),
    Row("proeval PR#19", "the gold answer loses its sign", '"#### -3"', "gsm8k_gold", sign),
    Row("sglang#29933", "the last number is of a question that runs on", '"#### 18", then "Question: ... 5": right',
        "Stop(strings)", run_on),
]  # fmt: skip
