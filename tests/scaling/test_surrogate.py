"""The surrogate back end.

Oracles: the formulas of its docstring in plain scalar arithmetic; the hidden law, which fits to its runs must find;
random configurations, none of which may be better than the best.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.scaling.service import hidden_law
from experiments.scaling.service.backend import Broken, Control, Done, Late, Stopped
from experiments.scaling.service.best_run import best
from experiments.scaling.service.hidden_law import Surrogate, centres, draw, setup_of
from experiments.scaling.service.schemas import Rules, TrainingConfig, problem
from experiments.scaling.service.surrogate import _run, backend, trajectory
from purelm.scaling import variable_projection
from purelm.scaling.laws import optimum
from purelm.scaling.runs import Runs

RULES = Rules()
QUIET = Surrogate(noise=0.0)


def config(layers=4, width=256, steps=1600, batch=32, lr=3e-3, head=64, inner=None, seconds=43_200, seed=0, **more):
    optimizer = {"lr_scheduler": {"peak_value": lr, **more.pop("schedule", {})}}
    if not more.pop("sgd", False):
        optimizer |= {"weight_decay": 0.1}
    return TrainingConfig.model_validate({
        "architecture_config": {
            "attention_bias": False, "head_dim": head, "hidden_size": width, "num_attention_heads": width // head,
            "intermediate_size": inner or 8 * width // 3, "num_hidden_layers": layers, "rms_norm_eps": 1e-5,
            "num_key_value_heads": width // head, "rope_theta": 10_000, "tie_word_embeddings": False,
            "dtype": more.pop("dtype", "bfloat16"), "vocab_size": more.pop("vocab", 32_000),
        },
        "optimizer_config": optimizer, "train_batch_size": batch, "val_batch_size": 16, "model_seed": seed,
        "total_train_tokens": more.pop("seq", 512) * batch * steps, "max_runtime_seconds": seconds, **more,
    })  # fmt: skip


def control(folder, seed=3, stop=lambda: False):
    """A worker's side that notes what it is told."""
    told = []
    return Control(folder, seed, told.append, lambda x, s: told.append((list(x), s)), stop), told


def losses(cfg, settings=QUIET, seed=3, rules=RULES):
    return trajectory(settings, cfg, rules, draw(settings, seed), seed).val_losses


def tuned(cfg, settings=QUIET, seed=3, rules=RULES):
    """The same run at lr*."""
    lr, _ = centres(draw(settings, seed), setup_of(cfg, rules))
    plan = cfg.optimizer_config.lr_scheduler.model_copy(update={"peak_value": float(lr)})
    return cfg.model_copy(update={"optimizer_config": cfg.optimizer_config.model_copy(update={"lr_scheduler": plan})})


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 16), st.integers(1, 200), st.integers(1, 64), st.floats(-9, -5), st.data())
def test_losses_and_seconds_are_the_formulas(layers, heads, n, batch, log_lr, data):
    """Oracle: the docstring's formulas, one evaluation at a time, below the edge and below ln(vocabulary)."""
    seed, fp32 = data.draw(st.integers(0, 2**62)), data.draw(st.booleans())
    cfg = config(layers, 64 * heads, 16 * n, batch, math.exp(log_lr), dtype="float32" if fp32 else "bfloat16")
    h = draw(QUIET, seed)
    d, inner, t_all = 64 * heads, 8 * 64 * heads // 3, 512 * batch * 16 * n
    N = layers * (4 * d * d + 3 * d * inner + 2 * d + 128) + d
    flops = 6 * (N + 32_000 * d) + 12 * layers * d * 512

    def seconds(tokens):
        rate = 9.9e14 * (0.25 if fp32 else 1) * 0.6 * d / (d + 512) * tokens / (tokens + 8192)
        return flops / rate

    lr = 1.79 * N**-0.713 * t_all**0.307 * math.exp(h.lr)
    x, y = log_lr - math.log(lr), math.log(512 * batch / (0.58 * t_all**0.571 * math.exp(h.batch)))
    q = h.lr_bend * x * x + h.batch_bend * y * y + h.both_bend * x * y
    shape = 0.004 * ((math.log(d / layers) - h.aspect) ** 2 + 4 * math.log(inner / (8 / 3 * d)) ** 2)
    got = trajectory(QUIET, cfg, RULES, h, seed)
    each = n * (512 * batch * seconds(512 * batch) + 0.002) + 2**18 / 3 * seconds(16 * 512) + 0.1
    assert isinstance(got.outcome, Done) == (16 * each <= 43_200)
    if x > h.edge:
        return
    for i, (s, found) in enumerate(zip(got.seconds, got.val_losses, strict=True), 1):
        share = i / 16
        left = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
        value = h.law.E + h.law.A / N**h.law.alpha + h.law.B / (share * t_all) ** h.law.beta + q + shape
        value += h.decay * left + (0 if fp32 else h.bf16)
        assert found == pytest.approx(min(value, math.log(32_000)), rel=1e-9)
        assert s == pytest.approx(i * each, rel=1e-9)


def test_a_run_is_the_same_whenever_it_is_asked_for():
    """Exact: by key and configuration; time and evaluations change no loss, all else does."""
    noisy = Surrogate()
    base = losses(config(), noisy)
    np.testing.assert_array_equal(base, losses(config(), noisy))
    np.testing.assert_array_equal(base, losses(config(seconds=20_000), noisy))
    np.testing.assert_array_equal(base[1::2], losses(config(n_evals=8), noisy))
    others = [losses(config(seed=1), noisy), losses(config(), noisy, seed=4), losses(config(), Surrogate(secret=1))]
    assert len({tuple(base), *map(tuple, others)}) == 4
    h = draw(noisy, 3)
    spread = [losses(config(seed=i, n_evals=1), noisy)[-1] for i in range(300)]
    assert np.std(spread) == pytest.approx(math.hypot(1, 0.2) * h.noise, rel=0.15)  # four standard errors
    assert np.mean(spread) == pytest.approx(losses(config())[-1], abs=4 * h.noise / 17)


@settings(max_examples=40)
@given(st.integers(0, 2**62), st.integers(2, 20), st.integers(2, 12), st.integers(1, 100))
def test_more_parameters_and_more_tokens_are_better(seed, layers, heads, n):
    """At the tuned learning rate, with the penalties of shape and batch taken out of what is compared."""
    flat = Surrogate(noise=0.0, shape=0.0)

    def last(layers, heads, n):
        cfg = tuned(config(layers, 64 * heads, 1600 * n, 8, vocab=10**9), flat, seed)
        _, batch = centres(draw(flat, seed), setup_of(cfg, RULES))
        q = hidden_law.penalty(draw(flat, seed), 0.0, math.log(512 * 8 / batch))
        got = trajectory(flat, cfg.model_copy(update={"max_runtime_seconds": 1e12}), RULES, draw(flat, seed), seed)
        return got.val_losses[-1] - q

    here = last(layers, heads, n)
    assert last(layers + 1, heads, n) < here and last(layers, heads + 1, n) < here and last(layers, heads, n + 1) < here


def test_time_ends_runs():
    """Exact: losses of a late run are the first of the whole one, and one moment decides."""
    whole = trajectory(QUIET, config(), RULES, draw(QUIET, 3), 3)
    assert isinstance(whole.outcome, Done) and len(whole.val_losses) == 16
    at = whole.outcome.seconds
    for limit, n in ((at * (1 + 1e-12), 16), (at * (1 - 1e-9), 15), (at / 2 * 1.01, 8), (1.0, 0)):
        cut = trajectory(QUIET, config(seconds=limit), RULES, draw(QUIET, 3), 3)
        if n == 16:
            assert cut.outcome == whole.outcome
        else:
            assert cut.outcome == Late(limit, tuple(whole.val_losses[:n].tolist())), limit
    fp32 = trajectory(QUIET, config(dtype="float32"), RULES, draw(QUIET, 3), 3)
    assert fp32.outcome.seconds > 1.5 * at
    many = trajectory(QUIET, config(steps=10**6, batch=1, width=2, head=2, n_evals=10**6), RULES, draw(QUIET, 3), 3)
    assert isinstance(many.outcome, Late) and len(many.val_losses) <= 43_200 / 0.1  # and it ends


def test_divergence():
    """Below the edge the penalty alone, above it losses that rise towards ln(vocabulary), far above it a broken run."""
    h = draw(QUIET, 3)
    lr = tuned(config()).optimizer_config.lr_scheduler.peak_value
    good, below, above = (losses(config(lr=lr * math.exp(h.edge + x))) for x in (-h.edge, -1e-6, 1e-2))
    assert (np.diff(below) < 0).all()
    assert below[-1] == pytest.approx(good[-1] + _q(h, h.edge - 1e-6, config()), abs=1e-9)
    assert np.isfinite(above).all() and above[0] < above[-1] and above[-1] > math.log(32_000)
    far = trajectory(QUIET, config(lr=lr * math.exp(h.edge + 1.6)), RULES, h, 3).outcome
    assert isinstance(far, Broken) and "after update" in far.failure and far.seconds > 0
    over = lr * math.exp(h.edge + 0.05)
    assert losses(config(lr=over, schedule={"warmup_frac": 0.1}))[-1] < 7 < losses(config(lr=over))[-1]
    assert losses(config(lr=over, schedule={"warmup_frac": 0.0}))[-1] > 7
    # A first learning rate above the edge diverges at once, whatever the peak is.
    assert losses(config(lr=lr, schedule={"init_value": over}))[-1] > 7
    bare = config(lr=lr * math.exp(h.edge - 0.4))
    unclipped = bare.optimizer_config.model_copy(update={"grad_clip_norm": None})
    assert losses(bare)[-1] < 7 < losses(bare.model_copy(update={"optimizer_config": unclipped}))[-1]


def _q(h, x, cfg):
    """What x adds to the penalty at this batch."""
    y = math.log(512 * cfg.train_batch_size / centres(h, setup_of(cfg, RULES))[1])
    return float(hidden_law.penalty(h, x, y) - hidden_law.penalty(h, 0.0, y))


def test_the_optimizer_the_decay_and_the_format_matter():
    base = tuned(config())
    lr = base.optimizer_config.lr_scheduler.peak_value
    sgd = [losses(config(lr=x, sgd=True))[-1] for x in (lr, 50 * lr)]
    assert min(sgd) > losses(base)[-1] + 0.5 and sgd[1] < sgd[0]
    ends = [losses(config(lr=lr, schedule={"final_lr_frac": x}))[-1] for x in (0.0, 0.1, 1.0)]
    h = draw(QUIET, 3)
    np.testing.assert_allclose(np.diff(ends), [0.1 * h.decay, 0.9 * h.decay], atol=1e-12)
    assert losses(config(lr=lr, dtype="float32"))[-1] == pytest.approx(losses(base)[-1] - h.bf16)


@settings(max_examples=8)
@given(st.integers(0, 2**62))
def test_the_hidden_law_is_found_from_runs(seed):
    """Oracle: the law itself. Runs at lr* and nearly batch*, without noise, fitted by variable projection."""
    flat, rules = Surrogate(noise=0.0, shape=0.0), Rules(seq_len=8)
    rows = []
    for layers, heads in ((2, 2), (3, 4), (4, 6), (6, 8), (8, 12), (12, 16)):
        for tokens in (3e7, 1e8, 3e8, 1e9, 3e9):
            batch = round(0.58 * tokens**0.571 * math.exp(draw(flat, seed).batch) / 8)
            cfg = tuned(config(layers, 64 * heads, round(tokens / 8 / batch), batch, seq=8, n_evals=1, vocab=10**9),
                        flat, seed, rules)  # fmt: skip
            setup = setup_of(cfg, rules)
            got = trajectory(flat, cfg.model_copy(update={"max_runtime_seconds": 1e9}), rules, draw(flat, seed), seed)
            rows.append((setup.parameters, setup.tokens, got.val_losses[-1]))
    law = variable_projection.fit(Runs(*np.array(rows, np.float64).T), huber=None)
    hidden = draw(flat, seed).law
    np.testing.assert_allclose(law[3:], hidden[3:], rtol=1e-3)
    for c in (1e19, 1e21):
        found, true = optimum(law, c), optimum(hidden, c)
        assert found.parameters == pytest.approx(true.parameters, rel=0.01)
        h = draw(flat, seed)
        assert found.loss == pytest.approx(true.loss + 0.1 * h.decay + h.bf16, abs=1e-3)


def test_at_once_or_as_time_passes(tmp_path):
    """Oracle: the trajectory. A run that is preempted and killed ends as one that is not, and loses no second."""
    whole = trajectory(Surrogate(), config(), RULES, draw(Surrogate(), 3), 3)
    once, told = control(tmp_path)
    assert backend(Surrogate()).run(config(), RULES, once) == whole.outcome
    assert told == [0.0, (whole.val_losses.tolist(), whole.seconds[-1])] and not list(tmp_path.iterdir())

    slow = Surrogate(time_scale=0.5)
    slept = []
    watched, told = control(tmp_path)
    assert _run(slow, config(), RULES, watched, slept.append) == whole.outcome
    assert sum(slept) == pytest.approx(0.5 * whole.outcome.seconds) and max(slept) <= 0.1
    lengths = [len(x[0]) for x in told[1:]]
    assert lengths == sorted(set(lengths)) and told[-1][0] == whole.val_losses.tolist()
    (tmp_path / "surrogate.json").unlink()

    slept.clear()
    stopping, told = control(tmp_path, stop=lambda: len(slept) >= 5)
    stopped = _run(slow, config(), RULES, stopping, slept.append)
    assert isinstance(stopped, Stopped) and stopped.seconds == pytest.approx(5 * 0.1 / 0.5)
    again, told = control(tmp_path)
    assert _run(slow, config(), RULES, again, slept.append) == whole.outcome and told[0] == stopped.seconds
    assert sum(slept) == pytest.approx(0.5 * whole.outcome.seconds)
    for text in ("", "{}", "[1]", '{"seconds": null}'):  # as a loss of power may leave it: from the start
        (tmp_path / "surrogate.json").write_text(text)
        again, told = control(tmp_path)
        assert _run(slow, config(), RULES, again, slept.append) == whole.outcome and told[0] == 0.0

    class Killed(BaseException):
        pass

    def kill(seconds):
        slept.append(seconds)
        if sum(slept) > 0.5 * whole.outcome.seconds * 0.6:
            raise Killed

    (tmp_path / "surrogate.json").unlink()
    slept.clear()
    with pytest.raises(Killed):
        _run(slow, config(), RULES, control(tmp_path)[0], kill)
    again, told = control(tmp_path)
    assert _run(slow, config(), RULES, again, slept.append) == whole.outcome
    assert 0.4 * whole.outcome.seconds < told[0] < 0.6 * whole.outcome.seconds


@settings(max_examples=6)
@given(st.integers(0, 2**62), st.sampled_from([30.0, 300.0, 4000.0]), st.integers(0, 2**32))
def test_no_configuration_is_better_than_the_best(seed, budget, draws):
    """Oracle: the run of the revealed configuration, and 120 random ones of all sizes, tuned, that use all the time."""
    told = backend(Surrogate()).reveal(config(), RULES, seed, budget)
    json.dumps(told, allow_nan=False)
    found = TrainingConfig.model_validate(told["best"]["training_config"])
    assert problem(found, RULES) is None and told["best"]["seconds"] <= budget
    h = draw(QUIET, seed)
    got = trajectory(QUIET, found, RULES, h, seed)
    assert isinstance(got.outcome, Done) and got.val_losses[-1] == told["best"]["loss"]
    assert told["law"]["alpha"] == h.law.alpha and told["hidden"]["noise"] == draw(Surrogate(), seed).noise > 0
    rng = np.random.default_rng(draws)
    least = np.inf
    for _ in range(120):
        a, b = found.architecture_config, found.train_batch_size
        near = rng.choice([0.03, 0.3, 1.5])
        width, layers, batch, inner = (
            max(1, round(x * math.exp(rng.normal() * near)))
            for x in (a.hidden_size // 2, a.num_hidden_layers, b, a.intermediate_size)
        )
        cfg = config(layers, 2 * width, 1, batch, head=2, inner=max(inner, 2 * width), n_evals=1,
                     schedule={"final_lr_frac": 0.0, "warmup_frac": rng.choice([0, 0.05, 0.1])})  # fmt: skip
        s = setup_of(cfg, RULES)
        steps = int((budget - hidden_law.eval_seconds(QUIET, s, RULES, 16)) // hidden_law.step_seconds(QUIET, s, 512))
        if steps < 1:
            continue
        cfg = cfg.model_copy(update={"total_train_tokens": 512 * batch * steps})
        lr = tuned(cfg, seed=seed).optimizer_config.lr_scheduler.peak_value
        plan = {"peak_value": lr * math.exp(rng.normal() * near), "final_lr_frac": 0.0}
        cfg = cfg.model_copy(update={"optimizer_config": config(schedule=plan).optimizer_config})
        values = losses(cfg, QUIET, seed)
        least = min(least, values[-1] if len(values) else np.inf)
    assert told["best"]["loss"] - 1e-4 <= least < told["best"]["loss"] + 0.05


def test_regret():
    """Exact: 0 for the best itself, None without a loss, and what lies beyond the budget does not count."""
    run = backend(Surrogate())
    first = run.reveal(config(), RULES, 5, 100.0)
    assert first["regret"] == first["final"]["loss"] - first["best"]["loss"] > 0
    found = TrainingConfig.model_validate(first["best"]["training_config"])
    assert run.reveal(found, RULES, 5, 100.0)["regret"] == 0.0
    assert run.reveal(found.model_copy(update={"n_evals": 1}), RULES, 5, 50.0)["regret"] is None
    assert run.reveal(config(lr=10.0), RULES, 5, 100.0)["final"]["outcome"] == "broken"
    short, long = (run.reveal(config(), RULES, 5, x)["best"] for x in (43_200, 4 * 43_200))
    assert short["seconds"] <= 43_200 < long["seconds"] <= 4 * 43_200  # a final run has more than a client may ask for
    assert long["loss"] < short["loss"]
    # A final run may take longer than an experiment, and can be submitted nevertheless.
    longer = run.reveal(found, RULES, 5, 172_800.0)
    assert 43_200 < longer["best"]["seconds"] <= 172_800
    found = TrainingConfig.model_validate(longer["best"]["training_config"])
    again = run.reveal(found.model_copy(update={"max_runtime_seconds": 172_800.0}), RULES, 5, 172_800.0)
    assert again["regret"] == 0.0 and again["final"]["seconds"] > 43_200
    for nothing in (0.5, 1.0):  # an evaluation alone takes longer with this device
        told = backend(Surrogate(peak_flops=1e9)).reveal(config(), RULES, 5, nothing)
        assert told["best"] is told["regret"] is None and told["law"]["E"] == draw(QUIET, 5).law.E
    small = Rules(max_parameters=3 * 10**7, max_train_tokens=10**8)
    capped = best(QUIET, draw(QUIET, 5), config(), small, 4000.0)
    assert problem(capped, small) is None and capped.total_train_tokens > 0.9e8


@pytest.mark.parametrize("bad", [{"noise": -1.0}, {"most_mfu": 1.5}, {"time_scale": math.nan}, {"peak_flops": 0.0}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        backend(Surrogate(**bad))
