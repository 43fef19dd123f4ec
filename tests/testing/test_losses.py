"""check_loss: right losses pass, wrong ones fail by the law they break. Oracles: losses with one known fault each."""

from functools import partial

import pytest
import torch
from torch.nn.functional import logsigmoid

from purelm import random, tree
from purelm.models import transformer
from purelm.models.leaves import init_leaves
from purelm.optim import adamw, schedules
from purelm.testing.laws import LawError, without
from purelm.testing.losses import LOSS_LAWS, check_loss
from purelm.train import init_state, make_step
from tests.dist.test_foreign import LOSSES, MODELS, batch_of, table_of
from tests.testing.foreign import T, both_ways, init, recurrent

NO_MASK = without(LOSS_LAWS, "masked", "padding")


def lm_batch(B=4, n=T, vocabulary=11):
    """Weights are multiples of 1/64, so that fp32 sums of them are exact."""
    key = random.key(2)
    return {
        "tokens": random.randint(random.fold_in(key, 0), (B, n), 0, vocabulary),
        "targets": random.randint(random.fold_in(key, 1), (B, n), 0, vocabulary),
        "weights": random.randint(random.fold_in(key, 2), (B, n), 0, 64) / 64.0,
    }


PARAMS = init(random.key(0), torch.float64)
PARAMS["mix"][1] = random.normal(random.key(8), (6,)).double()  # biases, which begin at 0


def test_losses_of_models_are_right():
    """Ours, packed too, and one of no library; with a denominator that is given, and with that of the batch."""
    cfg = transformer.Config(vocab_size=11, context_length=9, d_model=8, n_layers=2, n_heads=2)
    model, batch = transformer.make(cfg), lm_batch()
    params = model.init(random.key(0), dtype=torch.float64)
    ids = torch.tensor([1, 1, 1, 2, 2, 3, 3, 3, 0]).repeat(4, 1)
    check_loss(partial(model.loss, z_loss=0.1), params, batch)
    check_loss(model.loss, params, {**batch, "segment_ids": ids})
    check_loss(model.loss, params, {**batch, "denominator": torch.tensor(7.0)})
    del batch["weights"]
    check_loss(model.loss, params, batch, laws=NO_MASK)
    check_loss(recurrent().loss, PARAMS, lm_batch())
    check_loss(recurrent().loss, PARAMS, {**lm_batch(), "weights": lm_batch()["weights"] > 0.5})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_others_are_right(loss, model):
    """A frozen reference is given by the batch of a closure; pairs stay together."""
    made, f = MODELS[model](), LOSSES[loss]
    params = tree.cast(init_leaves(random.key(0), table_of(made, loss)), torch.float64)
    params = tree.map(lambda x: x + 0.1 * torch.cos(torch.arange(x.numel()).double()).view(x.shape), params)
    reference = {k: params.pop(k) for k in ("reference",) if k in params}
    batch = batch_of(0, 1, 0)
    laws = LOSS_LAWS if loss in ("next_token", "policy_gradient") else NO_MASK
    kept = {"next_token": ("tokens", "targets", "weights", "denominator")}.get(loss, tuple(batch))
    check_loss(
        lambda p, b: f(made, {**p, **reference}, b),
        params,
        {k: batch[k] for k in kept},
        laws=laws,
        group=2 if loss == "preference" else 1,
    )


def regression(params, batch):
    """Rows (x, y) with a weight each; params is a list with an integer and an absent leaf."""
    x, y, w = batch["x"], batch["targets"], batch["weights"]
    errors = (x @ params[0] + params[1]["b"] - y).square()
    return (w * errors).sum() / batch["denominator"], {"n": w.sum()}


W = random.normal(random.key(1), (3,)).double()
REGRESSION = [W, {"b": torch.tensor(0.5).double(), "absent": None}, torch.tensor(3)]
ROWS = {
    "x": random.normal(random.key(2), (5, 3)).double(),
    "targets": random.normal(random.key(3), (5,)).double(),
    "weights": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0]),
}


def test_a_weight_for_each_row():
    check_loss(regression, REGRESSION, ROWS, inputs=["x"])


def test_a_batch_that_is_no_mapping():
    """A sum over rows needs no denominator."""

    def loss(w, batch):
        return (batch[0] @ w - batch[1]).square().sum(), {}

    check_loss(loss, W, (ROWS["x"], ROWS["targets"]), laws=NO_MASK)


def test_pairs_are_kept_together():
    """Oracle: a loss of rows 2 i and 2 i + 1, which is another where pairs are torn."""

    def loss(params, batch):
        scores = (batch["x"] @ params).unflatten(0, (-1, 2))
        return -logsigmoid(scores[:, 0] - scores[:, 1]).sum(), {}

    batch = {"x": random.normal(random.key(2), (6, 3)).double()}
    check_loss(loss, W, batch, laws=NO_MASK, group=2)
    with pytest.raises(LawError) as error:
        check_loss(loss, W, batch, laws=NO_MASK)
    assert {"split", "order"} <= set(error.value.failures)


# Wrong losses. Each is the recurrent model's with one fault.

LOSS = recurrent().loss


def wrapped(after):
    """The loss after((scalar, metrics), params, batch)."""
    return lambda params, batch: after(LOSS(params, batch), params, batch)


def seen(change):
    """The loss that gets change(batch) for a batch."""
    return lambda params, batch: LOSS(params, change(batch))


def without_keys(*names):
    return seen(lambda batch: {k: x for k, x in batch.items() if k not in names})


def draws(out, params, batch):
    return out[0] + 0.0 * torch.rand(()), out[1]


def writes(params, batch):
    batch["seen"] = batch["tokens"]
    return LOSS(params, {k: x for k, x in batch.items() if k != "seen"})


def decayed(out, params, batch):
    """A summand of no row: it is counted in each part."""
    return out[0] + 0.1 * params["head"].square().sum(), out[1]


def averaged_metric(out, params, batch):
    return out[0], {**out[1], "mean_weight": batch["weights"].mean()}


def row_numbers(out, params, batch):
    """Row i counts i + 1 times, of the rows that it is given."""
    n = 1.0 + torch.arange(len(batch["tokens"]))
    return LOSS(params, {**batch, "weights": batch["weights"] * n[:, None]})[0], {}


def all_targets(out, params, batch):
    """Where the weight is 0, a tenth counts all the same."""
    return LOSS(params, {**batch, "weights": batch["weights"].clamp(min=0.1)})


def counts_targets(out, params, batch):
    """How many targets are 3, which is no matter of weights."""
    return out[0] + 0.1 * (batch["targets"] == 3).sum() / batch["denominator"], out[1]


def forgets_gradient(params, batch):
    return LOSS({**params, "head": params["head"].detach()}, batch)


def branches(params, batch):
    if not bool((batch["weights"] >= 0).all()):
        raise ValueError("weights must be at least 0")
    return LOSS(params, batch)


class Same(torch.autograd.Function):
    """x, with a backward formula and none for forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


BOTH_WAYS = recurrent(hidden=both_ways).loss


# name -> (loss, laws that fail, text of the message)
MUTANTS = {
    "no metrics": (
        lambda p, b: LOSS(p, b)[0], "scalar split metrics order masked padding gradients jvp per_sample",
        "scalar: the loss must return (scalar, metrics), got <class 'torch.Tensor'>",
    ),
    "metrics with a graph": (
        wrapped(lambda out, *_: (out[0], {"loss": out[0]})), "scalar", "metric loss must be detached: it holds",
    ),
    "metrics of positions": (
        wrapped(lambda out, p, b: (out[0], {"w": b["weights"].sum(0)})), "scalar",
        "metric w must be a 0-d tensor, got shape (9,)",
    ),
    # torch.func.vmap refuses draws from the global generator, too.
    "draws": (wrapped(draws), "pure per_sample", "torch's global generator was used"),
    "writes to the batch": (writes, "pure", "an argument's structure changed"),
    # What does not see the denominator is a mean over its rows, in metrics too.
    "a mean": (
        without_keys("denominator"), "split metrics", 'it does not divide by batch["denominator"], so that it is',
    ),
    "a summand of no row": (
        wrapped(decayed), "split", "so some summand depends on more than one row, or on none",
    ),
    "a mean in metrics": (
        wrapped(averaged_metric), "metrics", "metric mean_weight of 2 parts, summed, and of the whole (a mean must be",
    ),
    # A loss that splits row by row is a sum over rows, in any order.
    "row numbers": (wrapped(row_numbers), "split order", "losses with rows reversed and as given differ"),
    "masked targets count": (
        wrapped(counts_targets), "masked", "losses with other targets where weights is 0 and as given differ",
    ),
    "masked positions count": (
        wrapped(all_targets), "masked padding", "losses with other tokens after a row's last position where",
    ),
    "no weights": (without_keys("weights"), "masked padding", "losses with other targets where weights is 0 and"),
    "sees padding": (
        BOTH_WAYS, "padding", "losses with other tokens after a row's last position where weights is not 0 and",
    ),
    "a gradient forgotten": (forgets_gradient, "gradients", "gradients of the loss are not its slopes: at head 0 and"),
    "reads values": (branches, "per_sample", "raised RuntimeError"),
    "no forward mode": (
        lambda p, b: LOSS({**p, "head": Same.apply(p["head"])}, b), "jvp", "raised ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_losses_fail(name):
    """Exactly the laws named, with this message."""
    loss, laws, message = MUTANTS[name]
    with pytest.raises(LawError) as error:
        check_loss(loss, PARAMS, lm_batch())
    assert set(error.value.failures) == set(laws.split())
    assert message in str(error.value)


def test_every_law_has_a_mutant():
    assert {law for _, laws, _ in MUTANTS.values() for law in laws.split()} == set(LOSS_LAWS)


def test_a_mean_is_told_what_to_do():
    """Law: the library's step refuses the same loss, with the same advice."""
    mean = without_keys("denominator")
    advice = r"Divide the sum over targets by batch\[\"denominator\"\], their number in the whole batch"
    with pytest.raises(LawError, match=f"split: losses of 2 parts of the batch sum to .*{advice}"):
        check_loss(mean, PARAMS, lm_batch(), laws=["split"])
    step = make_step(mean, adamw(), schedules.constant(0.1), microbatches=2)
    with pytest.raises(ValueError, match=advice):
        step(init_state(PARAMS, adamw()), lm_batch())
    with pytest.raises(LawError, match='the batch has no "denominator" and no "targets", whose number it would be'):
        check_loss(lambda w, b: ((b["x"] @ w).square().mean(), {}), W, {"x": ROWS["x"]}, laws=["split"])


def test_arguments_stay_as_they_are():
    """Exact: neither the checks nor what a loss does to its batch reaches the caller's."""
    batch, params = lm_batch(), init(random.key(0), torch.float64)
    before = [x.clone() for x in tree.leaves((batch, params))]
    with pytest.raises(LawError):
        check_loss(writes, params, batch)
    assert batch.keys() == {"tokens", "targets", "weights"}
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(tree.leaves((batch, params)), before, strict=True))


def ones(**changes):
    return {**lm_batch(), "weights": torch.ones(4, T), **changes}


# name -> (loss, batch, law, text of the message): laws that have nothing to compare
EMPTY = {
    "no mask": (
        LOSS, {k: lm_batch()[k] for k in ("tokens", "targets")}, "masked",
        'masked: batch["weights"] must be the mask, (B, T) or (B,), which is 0 where nothing counts: name it',
    ),
    "an empty mask": (
        LOSS, ones(weights=torch.zeros(4, T)), "padding", "padding: weights is 0 wherever this law leaves it as it is",
    ),
    "a lone token id": (
        LOSS, ones(targets=torch.ones(4, T, dtype=torch.int64)), "masked", "no other values are there for targets",
    ),
    "blind to targets": (
        wrapped(lambda out, p, b: (p["head"].square().sum(), {})), ones(), "masked",
        "other values change nothing, of targets where weights is 0, nor elsewhere: nothing was compared",
    ),
    "no targets": (
        LOSS, {k: x for k, x in ones().items() if k != "targets"}, "masked",
        "masked: no leaf of the batch has the shape of weights but inputs: nothing to compare",
    ),
    "no gradient": (lambda p, b: (b["weights"].sum(), {}), ones(), "scalar", "gradient of the loss is zero at all"),
    "not finite": (wrapped(lambda out, *_: (out[0] / 0.0, {})), ones(), "scalar", "scalar: the scalar is inf"),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_compare_is_an_error(name):
    loss, batch, law, message = EMPTY[name]
    with pytest.raises(LawError) as error:
        check_loss(loss, PARAMS, batch, laws=[law])
    assert message in str(error.value)


def test_masks_of_other_names_and_ignored_targets():
    """Targets of -100 where the mask is 0 are put nowhere else; the mask is found by its name."""

    def loss(params, batch):
        weights = batch["mask"].double()
        targets = torch.where(batch["mask"] == 0, 0, batch["targets"])
        return LOSS(params, {**batch, "weights": weights, "targets": targets})

    batch = lm_batch()
    mask = (batch.pop("weights") > 0.4).long()
    batch |= {"mask": mask, "targets": torch.where(mask == 0, -100, batch["targets"])}
    check_loss(loss, PARAMS, {**batch, "denominator": mask.sum()}, mask="mask")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(group=0), "check_loss: group must be an int of at least 1, got 0"),
        (dict(group=3), "check_loss: batch must have at least two whole groups of 3 rows, got 4 rows"),
        (dict(group=4), "check_loss: batch must have at least two whole groups of 4 rows, got 4 rows"),
        (dict(batch={"x": torch.ones(2), "y": torch.ones(3)}), r"one size of axis 0, the rows; got {'x': 2, 'y': 3}"),
        (dict(batch={"denominator": torch.tensor(1.0)}), "one size of axis 0, the rows; got {}"),
        (dict(inputs="tokens"), r"inputs must be a list of names, got the string 'tokens'; pass \['tokens'\]"),
        (dict(atol=1.0), "check_loss: rtol and atol must be given together, both at least 0; got None and 1.0"),
        (dict(laws=["vmap"]), "check_loss: laws must be some of pure, scalar, split"),
        (dict(laws="pure"), "check_loss: laws must be a list of names, got the string 'pure'"),
        (dict(params={}), "check_loss: params must hold a floating tensor, got none among 0 leaves"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_loss(LOSS, **{"params": PARAMS, "batch": lm_batch(), **arguments})
