"""A small model that adds digits now and then, and what programs that learn from rewards are given."""

import torch

from experiments.grading import grader_named
from experiments.rl.problems import Problem
from experiments.rl.sampling import Sampler
from experiments.rl.shares import ONE
from purelm import generate
from purelm.models import hf, transformer
from purelm.tokenizer import encode, token_to_id
from tests.experiments.small_model import END, write_inputs
from tests.programs import run_here

__all__ = ["CPU", "FLAGS", "ROWS", "sampler_of", "write_policy"]

ROWS = [{"question": f"{a} + {b} =", "answer": a + b} for a in range(4) for b in range(4)]
CPU = torch.device("cpu")
FLAGS = [
    "--prompt", "{question}", "--gold", "{answer}", "--max-new-tokens", "4", "--prompts", "4", "--group-size", "4",
    "--device", "cpu", "--compute", "fp32", "--optim.lr", "3e-3", "--eval-every", "2", "--eval-prompts", "8",
]  # fmt: skip


def write_policy(folder):
    """train.jsonl and start/, a model that is right now and then."""
    write_inputs(folder, [f"{r['question']} {r['answer']}" for r in ROWS], ROWS, "train")
    flags = [
        "--run", folder / "sft", "--model", folder / "weights", "--train", folder / "train.jsonl", "--steps", "14",
        "--prompt", "{question}", "--response", " {answer}", "--batch-size", "8", "--max-length", "16", "--device",
        "cpu", "--optim.lr", "1e-2", "--optim.warmup-steps", "2", "--compute", "fp32", "--eval-every", "0",
    ]  # fmt: skip
    done = run_here("experiments.sft", *map(str, flags))
    assert done.returncode == 0, done.stderr
    (folder / "sft/export").rename(folder / "start")
    return folder


def sampler_of(folder, reward="number", world=ONE):
    """(sampler, parameters, problems) of such a folder."""
    params, cfg, bpe = hf.load(folder / "start")
    stop = generate.Stop((token_to_id(bpe, END),))
    sampler = Sampler(transformer.make(cfg), bpe, stop, 4, 8, grader_named(reward), world)
    problems = [Problem(r["question"], encode(bpe, r["question"]).astype("int64"), str(r["answer"])) for r in ROWS]
    return sampler, params, problems
