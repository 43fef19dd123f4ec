"""The back end that trains, on a file of 4,000 tokens: against a loop in plain torch, and against itself cut short."""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments.scaling.service import real
from experiments.scaling.service.backend import Broken, Control, Done, Late, Stopped
from experiments.scaling.service.real import Real, backend, model_of, rules_of
from experiments.scaling.service.schemas import Rules, TrainingConfig, n_parameters, problem
from purelm import accounting, random, tree
from purelm.data import TokenWriter, shuffled_windows
from purelm.models import transformer

V, T = 24, 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for name, n in (("train", 4000), ("val", 200)):
        steps = rng.integers(1, 4, n)  # something to learn: the next token is near
        with TokenWriter(folder / f"{name}.bin", vocab_size=V, tokenizer_sha256="0" * 64) as writer:
            writer.append(np.cumsum(steps) % V)
    return Real(folder / "train.bin", folder / "val.bin", seq_len=T, n_val_tokens=128, device="cpu", save_seconds=0)


def config(**changes):
    data = {
        "architecture_config": {
            "attention_bias": False, "head_dim": 8, "hidden_size": 16, "intermediate_size": 32,
            "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_theta": 10000, "tie_word_embeddings": False, "dtype": "float32", "vocab_size": V,
        } | changes.pop("architecture", {}),
        "optimizer_config": {"lr_scheduler": {"peak_value": 1e-2}, "weight_decay": 0.1, "eps_root": 0.0},
        "train_batch_size": 4, "val_batch_size": 2, "n_evals": 3, "total_train_tokens": 12 * 4 * T,
        "max_runtime_seconds": 600.0,
    } | changes  # fmt: skip
    return TrainingConfig.model_validate(data)


def control(folder: Path, stop=lambda: False, told=None):
    told = [] if told is None else told
    return Control(folder, 0, lambda s: None, lambda losses, s: told.append((tuple(losses), s)), stop)


def test_losses_are_those_of_a_loop_in_plain_torch(settings, tmp_path):
    """Oracle: torch.optim.AdamW, clip_grad_norm_, the schedule's formula and cross entropy of the logits."""
    cfg, told = config(), []
    done = backend(settings).run(cfg, rules_of(settings), control(tmp_path, told=told))
    model = model_of(cfg.architecture_config, T)
    params = transformer.init(random.key(0), model, real.course_std(tied=False))
    leaves = [x.requires_grad_() for x in tree.leaves(params)]
    optimizer = torch.optim.AdamW(leaves, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def loss(tokens, targets):
        logits = transformer.apply(params, tokens, model)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    train, val = (torch.from_numpy(np.fromfile(x, np.uint16).astype(np.int64)) for x in (settings.train, settings.val))
    expected = []
    for step in range(12):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 12)) / 2  # int(12 * 0.05) = 0 updates of warmup
        optimizer.param_groups[0]["lr"] = 1e-2 * cosine
        batch = shuffled_windows(train.numpy(), random.key(real.DATA_KEY), step, 4, T)
        optimizer.zero_grad()
        loss(batch["tokens"], batch["targets"]).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        if (step + 1) % 4 == 0:
            with torch.no_grad():
                expected.append(float(loss(val[:128].view(8, T), val[1:129].view(8, T))))
    assert isinstance(done, Done) and 0 < done.seconds < 600
    assert done.val_losses == pytest.approx(expected, rel=2e-5)  # twelve updates in fp32, in another order of sums
    assert [x for x, _ in told] == [done.val_losses[:n] for n in (1, 2, 3)]
    assert expected[-1] < expected[0] < math.log(V) + 0.5


@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_a_preempted_run_ends_as_if_it_had_not_been(settings, tmp_path, at):
    """Bit for bit: the same machine, the same order of sums."""
    cfg, rules = config(), rules_of(settings)
    whole = backend(settings).run(cfg, rules, control(tmp_path / "a"))
    asked = itertools.count()
    first = backend(settings).run(cfg, rules, control(tmp_path / "b", stop=lambda: next(asked) == at))
    begun = []
    again = control(tmp_path / "b")._replace(started=begun.append)
    second = backend(settings).run(cfg, rules, again)
    assert isinstance(first, Stopped) and isinstance(second, Done) and isinstance(whole, Done)
    assert second.val_losses == whole.val_losses
    assert 0 < begun[0] <= first.seconds < second.seconds  # the clock went on from the first attempt's


def test_the_steps_before_the_clock_leave_no_trace(settings, tmp_path, monkeypatch):
    """As on a GPU, where a state is trained to compile and record. Oracle: the run without one, bit for bit."""
    cfg, rules = config(), rules_of(settings)
    whole = backend(settings).run(cfg, rules, control(tmp_path / "a"))
    plain, warm = real._updates, []

    def warmed(settings, cfg, rules, control, parts, memory):
        assert memory is None
        warm.append(real._warm(parts))
        assert int(warm[-1].step) == real.WARMUP
        return plain(settings, cfg, rules, control, parts, warm[-1])

    monkeypatch.setattr(real, "_updates", warmed)
    asked = itertools.count()
    first = backend(settings).run(cfg, rules, control(tmp_path / "b", stop=lambda: next(asked) == 5))
    second = backend(settings).run(cfg, rules, control(tmp_path / "b"))
    assert isinstance(first, Stopped) and len(warm) == 2 and second.val_losses == whole.val_losses


def test_after_a_kill_it_goes_on_from_the_last_evaluation(settings, tmp_path):
    cfg, rules = config(), rules_of(settings)
    whole = backend(settings).run(cfg, rules, control(tmp_path / "a"))

    def die(losses, seconds):
        if len(losses) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend(settings).run(cfg, rules, control(tmp_path / "b")._replace(evaluated=die))
    told = []
    assert backend(settings).run(cfg, rules, control(tmp_path / "b", told=told)).val_losses == whole.val_losses
    assert [len(losses) for losses, _ in told] == [2, 3]  # the first evaluation was saved, the second was lost


def test_a_checkpoint_of_another_configuration_is_refused(settings, tmp_path):
    rules, asked = rules_of(settings), itertools.count()
    backend(settings).run(config(), rules, control(tmp_path, stop=lambda: next(asked) == 5))
    with pytest.raises(ValueError, match="its checkpoint is of another config"):
        backend(settings).run(config(model_seed=1), rules, control(tmp_path))


def test_out_of_time_with_the_losses_there_was_time_for(settings, tmp_path, monkeypatch):
    """A clock that advances a second with each update."""
    now = [0.0]
    monkeypatch.setattr(real, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def tick():
        now[0] += 1
        return False

    cfg = config(max_runtime_seconds=6.5)
    late = backend(settings).run(cfg, rules_of(settings), control(tmp_path, stop=tick))
    assert isinstance(late, Late) and late.seconds == 7 and len(late.val_losses) == 1
    done = backend(settings).run(config(max_runtime_seconds=12), rules_of(settings), control(tmp_path / "b", stop=tick))
    assert isinstance(done, Done) and done.seconds == 12
    last = backend(settings).run(
        config(max_runtime_seconds=11.5), rules_of(settings), control(tmp_path / "c", stop=tick)
    )
    assert isinstance(last, Late) and len(last.val_losses) == 3  # finished, but too late


def test_the_clock_stands_still_while_a_loss_is_reported(settings, tmp_path, monkeypatch):
    """A report waits for a busy database or a full disk; a run pays for its 12 updates of a second alone."""
    now = [0.0]
    monkeypatch.setattr(real, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def passes(seconds):
        now[0] += seconds
        return False

    slow = control(tmp_path, stop=lambda: passes(1.0))._replace(evaluated=lambda losses, seconds: passes(100.0))
    done = backend(settings).run(config(max_runtime_seconds=12), rules_of(settings), slow)
    assert isinstance(done, Done) and done.seconds == 12


def test_the_seed_changes_the_model_and_accumulation_does_not(settings, tmp_path):
    rules = rules_of(settings)
    runs = [
        backend(made).run(config(model_seed=seed), rules, control(tmp_path / str(i)))
        for i, (seed, made) in enumerate([(0, settings), (1, settings), (0, Real(**vars(settings) | {"rows": 3}))])
    ]
    a, b, c = (x.val_losses for x in runs)
    assert a != b and c == pytest.approx(a, rel=1e-4)  # sums over two halves


def test_a_run_that_diverges_is_broken(settings, tmp_path):
    optimizer = {"lr_scheduler": {"peak_value": 1e30}, "grad_clip_norm": None}
    found = backend(settings).run(config(optimizer_config=optimizer), rules_of(settings), control(tmp_path))
    assert isinstance(found, Broken) and "diverged" in found.failure


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_is_kept_and_tied_embeddings_learn(settings, tmp_path, tied):
    cfg = config(architecture={"dtype": "bfloat16", "tie_word_embeddings": tied})
    done = backend(settings).run(cfg, rules_of(settings), control(tmp_path))
    stored = {x.dtype for x in tree.leaves(real.alone(real.job_of(cfg, rules_of(settings), torch.device("cpu"), 0),
                                                      torch.device("cpu"), compiled=False, graph=False).init().params)}
    assert stored == {torch.bfloat16} and done.val_losses[-1] < done.val_losses[0] < math.log(V) + 0.7


def test_parameters_are_counted_as_the_model_counts_them():
    """Oracle: purelm.accounting on the same model."""
    for change in ({}, {"tie_word_embeddings": True}, {"num_hidden_layers": 3, "intermediate_size": 48}):
        a = config(architecture=change).architecture_config
        assert n_parameters(a) == accounting.n_params(model_of(a, T))


def test_rules_come_from_the_files(settings, tmp_path):
    rules = rules_of(settings)
    assert rules == Rules(seq_len=T, n_val_tokens=128, min_vocab_size=V, max_train_tokens=3999 // T * T,
                          attention_bias=False)  # fmt: skip
    assert problem(config(), rules) is None
    for change, words in (
        ({"total_train_tokens": 12 * 4 * T * 6}, "the data holds no more"),
        ({"architecture": {"vocab_size": V - 1}}, "vocab_size must be at least 24"),
        ({"architecture": {"attention_bias": True}}, "attention_bias must be false"),
        ({"val_batch_size": 3}, "must be divisible by seq_len"),
        ({"n_evals": 5}, "must be divisible by n_evals"),
        ({"total_train_tokens": 100}, "must be divisible by seq_len"),
    ):
        assert words in problem(config(**change), rules)
    for change, words in (
        ({"val": settings.train}, "has the same tokens as train"),
        ({"n_val_tokens": 256}, "takes one more"),
        ({"n_val_tokens": 100}, "must be divisible"),
    ):
        with pytest.raises(ValueError, match=words):
            rules_of(Real(**vars(settings) | change))
    other = tmp_path / "other.bin"
    with TokenWriter(other, vocab_size=V, tokenizer_sha256="1" * 64) as writer:
        writer.append(np.arange(200) % V)
    with pytest.raises(ValueError, match="not known to be of the tokenizer"):
        rules_of(Real(**vars(settings) | {"val": other}))


def test_token_files_that_are_replaced_while_the_server_runs(settings, tmp_path):
    """Their runs would be of other data than those before, without a word."""
    expected = tuple(real.sampled(x) for x in real._files(settings))
    same = dataclasses.replace(settings, expected=expected)
    assert isinstance(backend(same).run(config(), rules_of(same), control(tmp_path)), Done)
    for i, name in enumerate(("train", "val")):
        changed = dataclasses.replace(settings, expected=(*expected[:i], "0", *expected[i + 1 :]))
        with pytest.raises(ValueError, match=rf"{name}\.bin: has other tokens than when the server was started"):
            backend(changed).run(config(), rules_of(settings), control(tmp_path / name))
