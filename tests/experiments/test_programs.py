"""The programs end to end at toy size: what they leave behind, resumption to the bit, and errors of one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from purelm import checkpoint, track, tree
from purelm.data import open_tokens
from purelm.models import transformer
from purelm.models.config import config_from_dict
from purelm.tokenizer import fingerprint
from purelm.tokenizer import load as load_tokenizer
from purelm.tokenizer import save as save_tokenizer
from purelm.tokenizer import train as train_tokenizer
from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--batch-size", "4", "--vocab-size", "400"]
MODEL = ["--model.d-model", "32", "--model.n-layers", "2", "--model.n-heads", "2", "--model.context-length", "64"]


def run(module, *args, ok=True, env=None):
    done = run_here(f"experiments.{module}", *args, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def run_apart(module, *args, env):
    """As a user does, by a new interpreter."""
    command = [sys.executable, "-m", f"experiments.{module}", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# No compiler on the path: the programs run eagerly and the test is quick (resolved by shutil.which).
EAGER = {"PATH": str(Path(sys.executable).parent)}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs") / "quick"
    flags = ["--run", folder, "--stories", 300, "--steps", 12, "--context-length", 64, *SMALL]
    done = run_apart("quickstart", *flags, env=EAGER)
    return folder, done


def test_quickstart_leaves_everything_behind(quick):
    folder, done = quick
    for name in ("config.json", "metrics.jsonl", "curves.png", "report.html", "tokenizer.json", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["held-out bits per byte"] > summary["floor of these held-out documents"] > 0
    rows = track.read_rows(folder / "metrics.jsonl")
    assert {"step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second"} <= set(rows[0])
    assert rows[-1]["heldout_bits_per_byte"] == pytest.approx(summary["held-out bits per byte"])
    assert "above the floor" in done.stdout and "experiments.generate" in done.stdout


def test_generate_continues_and_is_reproducible(quick):
    folder, _ = quick
    args = ("generate", folder, "--prompt", "One day", "--max-new-tokens", 20)
    first, second = run(*args), run(*args)
    assert first.stdout == second.stdout and first.stdout.startswith("One day")
    assert len(first.stdout) > len("One day\n")
    assert run(*args, "--seed", 5).stdout != first.stdout


def test_quickstart_again_replaces_its_own_run_only(quick, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = run("quickstart", "--run", tmp_path, ok=False)
    assert done.returncode == 2 and "was not made by quickstart" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "keep"


def arguments(quick, run_folder, *args):
    data = quick[0] / "data"
    return [
        *("--run", run_folder, "--train", data / "train.bin", "--heldout", data / "heldout.bin"),
        *("--tokenizer", quick[0] / "tokenizer.json", "--batch-size", 4, "--log-every", 1, "--eval-every", 3),
        *("--eval-tokens", 500, "--last-eval-tokens", 500, "--save-every", 4, "--optim.warmup-steps", 2),
        *MODEL,
        *args,
    ]


def pretrain(quick, run_folder, *args, ok=True, env=EAGER):
    return run("pretrain", *arguments(quick, run_folder, *args), ok=ok, env=env)


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """Twelve steps without interruption."""
    folder = tmp_path_factory.mktemp("programs") / "whole"
    pretrain(quick, folder, "--steps", 12)
    return folder


def same_state(a, b):
    x, y = (checkpoint.load(p / "checkpoints")[0] for p in (a, b))
    assert tree.structure(x) == tree.structure(y)
    return all(torch.equal(i, j) for i, j in zip(tree.leaves(x), tree.leaves(y), strict=True))


def without_time(path):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "mfu")}
        for row in track.read_rows(path / "metrics.jsonl")
    ]


KILLED = """
import os, sys, tyro
from experiments import pretrain
from experiments.config import Pretrain
def start(cfg, world, start=pretrain.start):
    ready = start(cfg, world)
    def step(state, batch):
        if int(state.step) == 7:
            os.kill(os.getpid(), 9)
        return ready.run.step(state, batch)
    return ready._replace(run=ready.run._replace(step=step))
pretrain.start = start
pretrain.main(tyro.cli(Pretrain))
"""


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(quick, whole, tmp_path):
    """kill -9 between checkpoints, in step 8, with the rows of 5 and 6 written already."""
    flags = arguments(quick, tmp_path / "cut", "--steps", 12)
    command = [sys.executable, "-c", KILLED, *map(str, flags)]
    env = {**os.environ, **EAGER, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 4
    assert without_time(tmp_path / "cut")[-1]["step"] == 6
    done = pretrain(quick, tmp_path / "cut", "--steps", 12, "--resume")
    assert "resumed from step 4" in done.stderr
    assert same_state(whole, tmp_path / "cut")
    assert without_time(whole) == without_time(tmp_path / "cut")


def test_microbatches_remat_and_other_ops_give_the_same_losses(quick, tmp_path):
    pretrain(quick, tmp_path / "a", "--steps", 3)
    a = without_time(tmp_path / "a")
    for flags in (["--microbatches", 2, "--remat"], ["--ops", "fused"], ["--ops", "reference"]):
        folder = tmp_path / "-".join(map(str, flags))
        pretrain(quick, folder, "--steps", 3, *flags)
        for x, y in zip(a, without_time(folder), strict=True):
            assert x == pytest.approx(y, rel=1e-4)  # fp32, another order of sums


def test_the_last_evaluation_sees_what_eval_stride_and_last_eval_tokens_say(quick, tmp_path):
    """Oracle: windows cut by hand, 64 targets of the first and the last 16 of each other one."""
    pretrain(quick, tmp_path, "--steps", 3, "--eval-stride", 16, "--last-eval-tokens", 64 + 5 * 16)
    state, meta = checkpoint.load(tmp_path / "checkpoints")
    cfg = config_from_dict(meta["config"]["model"])
    ids = torch.from_numpy(open_tokens(quick[0] / "data" / "heldout.bin").tokens[:200].astype("int64"))
    nll = []
    for start in range(0, 6 * 16, 16):
        logits = transformer.apply(state["params"], ids[start : start + 64][None], cfg)[0]
        of_window = torch.nn.functional.cross_entropy(logits, ids[start + 1 : start + 65], reduction="none")
        nll.append(of_window if start == 0 else of_window[-16:])
    row = track.read_rows(tmp_path / "metrics.jsonl")[-1]
    assert row["heldout_loss"] == pytest.approx(float(torch.cat(nll).double().mean()), rel=1e-5)  # fp32


@pytest.mark.parametrize(
    "args,message",
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--model.vocab-size", "17"], "model.vocab_size 17 is below"),
        (["--resume"], "no complete checkpoint"),
        (["--eval-stride", "65"], "eval_stride is 65: allowed is 1 to model.context_length, 64"),
        (["--device", "cuda:99"], "device"),
        (["--microbatches", "3"], "4"),
        (["--train", "/nowhere/train.bin"], "/nowhere/train.bin"),
        (["--model.context-length", "10000000"], "context"),
        (["--optim.lr", "1e30", "--optim.clip", "0", "--steps", "30"], "loss is"),
        (["--batch-size", "1000000000000"], "training needs"),
        (["--device", "tpu"], "device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_errors_are_one_line(quick, tmp_path, args, message):
    done = pretrain(quick, tmp_path / "bad", "--steps", 2, *args, ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    error = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0], done.stderr


def test_an_existing_run_is_not_overwritten_and_another_config_is_refused(quick, tmp_path):
    pretrain(quick, tmp_path / "r", "--steps", 2)
    done = pretrain(quick, tmp_path / "r", "--steps", 2, ok=False)
    assert "has a checkpoint of step 2" in done.stderr
    done = pretrain(quick, tmp_path / "r", "--steps", 4, "--resume", "--model.d-model", 64, ok=False)
    assert "model.d_model 64 is not that of the checkpoint, 32" in done.stderr and "Traceback" not in done.stderr
    done = pretrain(quick, tmp_path / "r", "--steps", 4, "--resume", "--seed", 1, ok=False)
    assert "seed 1 is not that of the checkpoint" in done.stderr
    done = pretrain(quick, tmp_path / "r", "--steps", 4, "--resume-anyway", "--model.d-model", 64, ok=False)
    assert "the given config needs" in done.stderr and "Traceback" not in done.stderr  # no flag makes shapes equal


def test_prompts_are_looked_at_before_training(quick, tmp_path):
    """Without a tokenizer; empty where no token can begin a document. Oracle: no file."""
    save_tokenizer(train_tokenizer(["abab"], 258), tmp_path / "no_end.json")
    bare = quick[0] / "data" / "train.bin"
    shutil.copyfile(bare, tmp_path / "bare.bin")
    files = ["--run", tmp_path / "run", "--train", tmp_path / "bare.bin", "--token-dtype", "uint16"]
    flags = [*files, "--steps", 2, *MODEL]
    done = run("pretrain", *flags, "--model.vocab-size", 400, "--sample", "x", ok=False, env=EAGER)
    assert "sample: 'x' cannot be encoded without a --tokenizer" in done.stderr
    flags += ["--tokenizer", tmp_path / "no_end.json"]
    done = run("pretrain", *flags, "--model.vocab-size", 400, "--sample", "", ok=False, env=EAGER)
    assert "prompt is empty, and the tokenizer has no <|endoftext|>" in done.stderr
    assert not (tmp_path / "run").exists()


def test_accounting_does_not_write_over_what_it_reads(quick):
    path = quick[0] / "config.json"
    before = path.read_text()
    done = run("accounting", "--run", quick[0], "--json", path, ok=False)
    assert done.returncode == 2 and "would be written over" in done.stderr and path.read_text() == before


def test_generate_refuses_another_tokenizer_of_the_same_size(quick, tmp_path):
    """It would write what other ids mean. Oracle: the fingerprints of both."""
    shutil.copytree(quick[0], tmp_path / "run")
    own = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    other = train_tokenizer(quick[0] / "data" / "heldout.txt", len(own.vocab), special_tokens=own.special_tokens)
    assert len(own.vocab) == len(other.vocab)
    save_tokenizer(other, tmp_path / "run" / "tokenizer.json")
    done = run("generate", tmp_path / "run", "--prompt", "One", ok=False)
    assert done.returncode == 2 and not done.stdout
    assert f"its sha256 is {fingerprint(other)}, but the model was trained on the ids of {fingerprint(own)}" in (
        done.stderr
    )


def test_quickstart_on_text_of_two_encodings(tmp_path):
    """Oracle: the text itself. UTF-8 where that fits, cp1252 elsewhere."""
    texts = [f"caf\xe9 number {i} has tea and cake and tea" for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode("cp1252" if i % 2 else "utf-8"))
    flags = ["--data", tmp_path, "--steps", 2, "--context-length", 16, "--encoding", "utf-8", "cp1252", *SMALL]
    run("quickstart", "--run", tmp_path.parent / "run", *flags, env=EAGER)
    parts = [(tmp_path.parent / "run" / "data" / f"{name}.txt").read_text() for name in ("train", "heldout")]
    assert sorted("\n".join(parts).replace("<|endoftext|>", "\n").split("\n"))[-60:] == sorted(texts)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.txt", b"", "empty"),
        ("latin.txt", b"caf\xe9 au lait\n" * 50, "latin.txt"),
        ("what.xyz", b"text", "what.xyz"),
    ],
)
def test_quickstart_on_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    done = run("quickstart", "--run", tmp_path / "run", "--data", tmp_path / name, ok=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
