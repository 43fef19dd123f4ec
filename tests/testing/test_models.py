"""check_model: right models pass, wrong ones fail by the law they break. Oracles: models with one known fault each.

Every axis of the Transformer's Config is checked in tests/models/test_laws.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from purelm import random, tree
from purelm.models import transformer
from purelm.models.leaves import Leaf
from purelm.models.transformer import Config, RopeScaling
from purelm.testing.laws import LawError, without
from purelm.testing.model_cache_laws import CACHE_LAWS
from purelm.testing.models import MODEL_LAWS, check_model
from tests import own_parts
from tests.models.conftest import AXES, LEFT_OUT, SIZES
from tests.testing.foreign import LEAVES, V, both_ways, cross_entropy, hidden_of, init, recurrent, step


def test_what_is_left_out_fails():
    """Of a bidirectional model and of positions that scale with the length, exactly those laws fail."""
    for name in ("bidirectional", "rope dynamic ntk"):
        with pytest.raises(LawError) as error:
            check_model(transformer.make(Config(**{**SIZES, **AXES[name]})), length=12)
        assert set(error.value.failures) == set(LEFT_OUT[name])


def test_right_models_pass():
    """Of no library, ours, ours with parts of one's own, and one that sees both sides."""
    check_model(recurrent())
    check_model(transformer.make(Config(**{**SIZES, **AXES["like gemma2"]})))
    check_model(transformer.make(own_parts.config()))
    check_model(recurrent(hidden=both_ways), laws=without(MODEL_LAWS, "causality", "padding", *CACHE_LAWS))


def absent(*args, **kwargs):
    raise NotImplementedError


def test_a_model_without_a_cache_or_segments():
    def hidden(params, tokens):
        return hidden_of(step)(params, tokens)

    def apply(params, tokens):
        return hidden(params, tokens) @ params["head"].T

    def loss(params, batch):
        return cross_entropy(apply(params, batch["tokens"]), {k: batch[k] for k in ("tokens", "targets")})

    bare = recurrent()._replace(
        hidden=hidden, apply=apply, loss=loss, init_cache=absent, prefill=absent, decode=absent, decode_=absent
    )
    lacking = ("packing", "weights", "options", *CACHE_LAWS)
    check_model(bare, laws=without(MODEL_LAWS, *lacking))
    with pytest.raises(LawError, match="check_model: cache: raised NotImplementedError") as error:
        check_model(bare)
    assert set(error.value.failures) == set(lacking)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_parameters_of_any_dtype(dtype):
    """The tolerance is the dtype's; parameters may hold the graph of something else, integers and absent leaves."""
    params = tree.map(lambda x: (x + 0.1).requires_grad_(), recurrent().init(random.key(4), dtype=dtype))
    params["version"] = torch.tensor(3)
    check_model(recurrent(), params, batch_size=2, length=5)


def test_half_precision_has_no_difference_quotients():
    params = tree.cast(recurrent().init(random.key(4)), torch.bfloat16)
    with pytest.raises(LawError, match="gradients: difference quotients of the loss need parameters in float32 or"):
        check_model(recurrent(), params, laws=["gradients"])
    check_model(recurrent(), params, laws=["causality", "context", "rows", "cache"])


# Wrong models. Each is recurrent() with one fault.


def replaced(**fields):
    return recurrent()._replace(**fields)


def wrapped(name, after):
    """recurrent() whose function `name` is after(its result, *its arguments)."""
    f = getattr(recurrent(), name)
    return replaced(**{name: lambda *args, **kwargs: after(f(*args, **kwargs), *args)})


def same_key(key, dtype=torch.float32):
    params = init(key, dtype)
    return {**params, "head": 0.5 * params["embedding"]}


def flaky_init():
    calls = itertools.count()
    return lambda key, dtype=torch.float32: init(random.fold_in(key, next(calls)), dtype)


def forgets_bias(params, h, x):
    return torch.tanh(x + h @ params["mix"][0].T)


def forgets_past(params, h, x):
    u, b = params["mix"]
    return torch.tanh(x + x @ u.T + b)


def detached(params, h, x):
    return step(params, h.detach(), x)


def over_rows(params, h, x):
    new = step(params, h, x)
    return new - 0.1 * new.mean(0)


def refuses_nan(params, h, x):
    if bool(torch.isnan(x).any()):
        raise ValueError("nan")
    return step(params, h, x)


class Tanh(torch.autograd.Function):
    """Tanh with a backward formula and none for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


def no_forward_mode(params, h, x):
    u, b = params["mix"]
    return Tanh.apply(x + h @ u.T + b)


def wraps_around(params, tokens, *, segment_ids=None):
    """Mixes each embedding with the one before by torch.roll: the first position sees the last."""
    h = hidden_of(step)(params, tokens, segment_ids=segment_ids)
    return h + 0.1 * params["embedding"][tokens].roll(1, 1)


def one_document(params, tokens, *, segment_ids=None):
    return hidden_of(step)(params, tokens)


def own_rows(logits, params, tokens, *_):
    """A row's number has an influence."""
    return logits * (1 + 0.1 * torch.arange(len(tokens)))[:, None, None]


def in_place(name):
    f = getattr(recurrent(), name)

    def writes(params, tokens, *args, **kwargs):
        params["head"].mul_(1.0)
        return f(params, tokens, *args, **kwargs)

    return replaced(**{name: writes})


def noisy(logits, *_):
    return logits + 0.0 * torch.rand(())


def ignoring(*names):
    """The loss that does not see these leaves of the batch."""
    f = recurrent().loss
    return replaced(loss=lambda p, b, **o: f(p, {k: v for k, v in b.items() if k not in names}, **o))


def without_options(name, *keywords):
    f = getattr(recurrent(), name)
    return replaced(**{name: lambda *a, **o: f(*a, **{k: v for k, v in o.items() if k not in keywords})})


def chunked_loss():
    """Leaves out what the last chunk has less than the others."""
    f = recurrent().loss

    def loss(params, batch, *, z_loss=0.0, chunk=None):
        n = batch["tokens"].shape[1] // (chunk or 1) * (chunk or 1)
        return f(params, {k: x[:, :n] if x.ndim else x for k, x in batch.items()}, z_loss=z_loss)

    return replaced(loss=loss)


def attached(logits, batch, z_loss=0.0):
    value, _ = cross_entropy(logits, batch, z_loss)
    return value, {"nll": value}


def in_bits(out, *_):
    return out[0] / torch.tensor(2.0).log().to(out[0].dtype), out[1]


def restarts(params, tokens, cache, **options):
    return recurrent().prefill(params, tokens, cache._replace(h=0 * cache.h), **options)


def fills_given(params, tokens, cache, **options):
    logits, state = recurrent().prefill(params, tokens, cache, **options)
    return logits, cache._replace(h=cache.h.copy_(state.h))


def pads_once(params, tokens, cache, *, lengths=None, **options):
    """Takes lengths for those of a prompt's first chunk, which finds an empty cache."""
    return recurrent().prefill(params, tokens, cache, lengths=None if bool(cache.h.any()) else lengths, **options)


def keeps_old(params, tokens, cache, **options):
    return recurrent().decode(params, tokens, cache, **options)[0], cache


def leaves_a_mark(params, tokens, *, segment_ids=None):
    params["seen"] = V
    return recurrent().apply(params, tokens, segment_ids=segment_ids)


SHAPED = {**LEAVES, "head": Leaf((V, 7), "head", "head")}
SCALED = Config(**{**SIZES, "rope_scaling": RopeScaling("dynamic_ntk", 2.0, 4)})

# name -> (model, laws that fail, text of the message)
MUTANTS = {
    "table of another shape": (replaced(leaves=SHAPED), "init", r"head has shape (11, 6), the leaf table says (11, 7)"),
    "table lacks": (replaced(leaves={"head": LEAVES["head"]}), "init", "params have embedding, mix.0, mix.1, unknown"),
    "table has more": (replaced(leaves={**LEAVES, "b": LEAVES["mix.1"]}), "init", "params lack b, which the leaf"),
    "one key for all": (
        replaced(init=lambda key, dtype=torch.float32: init(random.key(0), dtype)), "init",
        "params of inits from two keys are the same",
    ),
    "one dtype for all": (
        replaced(init=lambda key, dtype=None: init(key)), "init", "torch.float64 is due if asked for, got embedding",
    ),
    "stateful init": (replaced(init=flaky_init()), "init", "init: results of two calls with the same arguments differ"),
    "a key used twice": (replaced(init=same_key), "keys", "embedding and head are drawn with one key"),
    "a bias forgotten": (recurrent(forgets_bias), "used", "the gradient of the loss is zero at mix.1: is it used?"),
    "writes to params": (in_place("apply"), "pure", "apply: argument 0.params.head was written to"),
    "writes a key": (replaced(apply=leaves_a_mark), "pure", "apply: an argument's structure changed"),
    "draws": (wrapped("apply", noisy), "pure", "apply: torch's global generator was used"),
    "no past": (recurrent(forgets_past), "context", "logits at position 1 do not depend on the token before"),
    # The first token of a row, a shorter one or a document in it, depends on the last one; decoding cannot.
    "sees the end": (
        recurrent(hidden=wraps_around), "causality padding packing cache lengths",
        "logits with other tokens from position 1 on differ in row ",
    ),
    # Rows alone are also what padded and packed rows are compared with.
    "mean over rows": (
        recurrent(over_rows), "rows padding packing lengths", "logits of row 0 in a batch and alone differ in position",
    ),
    "row numbers": (
        wrapped("apply", own_rows), "rows padding packing logits loss weights log_probs options cache lengths",
        "logits of row 1 in a batch and alone differ in position",
    ),
    "a scale by length": (
        transformer.make(SCALED), "padding", "logits of row 0, 8 tokens padded to 9, and alone differ in position",
    ),
    "packed rows as one": (
        recurrent(hidden=one_document), "packing", "logits of the document at positions",
    ),
    "a loss of one document": (ignoring("segment_ids"), "packing", "the loss of packed documents and their mean loss"),
    "hidden before a scale": (
        wrapped("hidden", lambda h, *_: 2.0 * h), "logits", "unembedding^T, with no soft cap between, differ in",
    ),
    "another head": (
        wrapped("unembedding", lambda w, *_: w.flip(0)), "logits", "apply's logits and hidden unembedding^T, with",
    ),
    "metrics with a graph": (
        recurrent(cross_entropy=attached), "loss", "metric nll must be detached: it holds the graph of the loss",
    ),
    # A wrong unit is wrong with weights and in the z term, too.
    "bits": (wrapped("loss", in_bits), "loss weights options", "the loss and the mean of -log_softmax(logits)[target]"),
    "no weights": (ignoring("weights"), "weights", "the loss and sum w nll / sum w differ"),
    "no denominator": (ignoring("denominator"), "weights", 'the loss and sum w nll / batch["denominator"] differ'),
    "no z": (without_options("loss", "z_loss"), "options", "what z_loss=0.5 adds and half the mean (log Z)^2 differ"),
    "no temperature": (without_options("log_probs", "temperature"), "options", "log_probs at temperature 0.7"),
    "a chunk is lost": (chunked_loss(), "options", "losses with chunk=2 and without differ"),
    # Temperatures are compared with the formula.
    "an entropy's sign": (
        wrapped("log_probs", lambda out, *_: (out[0], -out[1])), "log_probs options",
        "entropies and those of apply's logits differ in row ",
    ),
    "truncated backward": (recurrent(detached), "gradients", "gradients of the loss are not its slopes: at embedding "),
    "no forward mode": (recurrent(no_forward_mode), "jvp", "raised "),
    "reads values": (recurrent(refuses_nan), "per_sample", "raised RuntimeError"),
    "chunks start anew": (  # of equal lengths or not
        replaced(prefill=restarts), "cache lengths",
        "logits of prefill's second chunk (positions 3 to 4, the last) and of",
    ),
    "the old cache": (replaced(decode_=keeps_old), "decode_", "caches of decode_ and decode at position 4 differ at h"),
    "lengths unread": (
        without_options("prefill", "lengths"), "lengths", "logits after a prompt of lengths [3, 2, 1] and of apply",
    ),
    "lengths of a later chunk unread": (
        replaced(prefill=pads_once), "lengths", "[3, 2, 1], a chunk of lengths [1, 2, 1] and of apply differ in row ",
    ),
    "writes to the cache": (
        replaced(prefill=fills_given), "cache_pure", "prefill: argument 0.cache.h was written to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_models_fail(name):
    """Exactly the laws named; the first of them with this message."""
    model, laws, message = MUTANTS[name]
    with pytest.raises(LawError) as error:
        check_model(model)
    assert set(error.value.failures) == set(laws.split())
    assert f"check_model: {laws.split()[0]}: " in str(error.value)
    assert message in str(error.value)


def test_every_law_has_a_mutant():
    assert {law for _, laws, _ in MUTANTS.values() for law in laws.split()} == set(MODEL_LAWS)


CONSTANT = recurrent(hidden=lambda params, tokens, **_: params["embedding"][0 * tokens])


def test_nothing_to_compare_is_an_error():
    """A model that ignores its inputs passes no law about them."""
    laws = ("pure", "causality", "context", "rows", "padding", "packing", "logits", "loss", "log_probs", "cache")
    with pytest.raises(LawError) as error:
        check_model(CONSTANT, laws=laws)
    assert set(error.value.failures) == set(laws)
    assert "the same in all rows and positions, so that nothing can be compared" in str(error.value)
    flat = {"embedding": torch.zeros(V, 6), "mix": [torch.zeros(6, 6), torch.zeros(6)], "head": torch.zeros(V, 6)}
    with pytest.raises(LawError, match="used: the gradient of the loss is zero at all parameters"):
        check_model(recurrent(), flat, laws=["used", "gradients", "jvp", "per_sample"])
    with pytest.raises(LawError, match="keys: no leaf of init has 16 different values to compare"):
        check_model(replaced(init=lambda key, dtype=None: flat), laws=["keys"])


def test_logits_that_are_not_finite():
    with pytest.raises(LawError, match="rows: apply's logits are not all finite"):
        check_model(wrapped("apply", lambda x, *_: x / 0.0), laws=["rows"])
    with pytest.raises(
        LawError, match=r"rows: apply must give floating logits \(B, T, V\) = \(3, 9, 11\), got \(3, 9\)"
    ):
        check_model(wrapped("apply", lambda x, *_: x.argmax(-1)), laws=["rows"])


def test_given_tolerances():
    """Closed form: logits 1e-6 apart."""
    model = wrapped("apply", lambda x, *_: x + 1e-6)
    check_model(model, laws=["logits"], rtol=0.0, atol=2e-6)
    with pytest.raises(LawError, match=r"1e-06 apart where 5e-07 is allowed \(297 of 297 elements differ\)"):
        check_model(model, laws=["logits"], rtol=0.0, atol=5e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=1), "check_model: batch_size must be an int of at least 2, got 1"),
        (dict(length=3), r"check_model: length must be in 4..9 \(context_length\), got 3"),
        (dict(length=10), r"check_model: length must be in 4..9 \(context_length\), got 10"),
        (dict(rtol=0.1), "check_model: rtol and atol must be given together, both at least 0; got 0.1 and None"),
        (dict(rtol=0.1, atol=-1.0), "check_model: rtol and atol must be given together"),
        (dict(params={"w": torch.ones(2, dtype=torch.int64)}), "check_model: params must hold a floating tensor"),
        (dict(laws=["vmap"]), "check_model: laws must be some of pure, init"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_model(recurrent(), **arguments)


def test_short_contexts():
    """A model of fewer positions than the default length; one of too few is refused."""
    check_model(transformer.make(replace(own_parts.config(), context_length=4, position="learned")))
    with pytest.raises(ValueError, match=r"length must be in 4..3 \(context_length\), got 3"):
        check_model(recurrent()._replace(context_length=3))
