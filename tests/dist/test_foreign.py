"""Models and losses that are none of the library's, under every strategy. Oracle: one process with the whole batch.

A model that mixes positions by running means, ours with parts of one's own, and ours; losses: of the next token, of
pairs with a frozen reference (DPO, Rafailov et al. 2023, arXiv:2305.18290, equation 7), of weighted log-probabilities
(a policy gradient with an entropy bonus), and of a classifier with a head of its own.
"""

from functools import partial

import pytest
import torch

from purelm import random, tree
from purelm.dist import ddp, fsdp, tensor_parallel, zero
from purelm.dist.world import rank_of, size_of
from purelm.models import transformer
from purelm.models.leaves import Cut, Draw, Fill, Leaf, init_leaves, like, with_prefix
from purelm.models.model import Model
from purelm.ops import REFERENCE
from purelm.optim import adamw, schedules
from purelm.train import ALONE, Precision, init_state, make_step
from tests import own_parts
from tests.dist.models import CFG, assert_close
from tests.dist.processes import RankError, run

F64 = Precision(torch.float64, torch.float64, torch.float64)
V, D, F, T, CLASSES = 19, 12, 16, 8, 5


def means(ops=REFERENCE, wrap_block=lambda f: f):
    """h_t = x_t + W2 relu(W1 mean(x_0 .. x_t)), twice; an embedding before, a head behind, and a norm."""
    leaves = {"embedding": Leaf((V, D), "embedding", "embedding", Draw(1.0), Cut(0, None))}
    for i in range(2):
        inner = Cut(0, F, "F"), Cut(1, F, "F")
        leaves |= {
            f"layers.{i}.w1": Leaf((F, D), "matrix", "ffn", Draw(0.3), inner[0], place="sublayer"),
            f"layers.{i}.w2": Leaf((D, F), "matrix", "ffn", Draw(0.3), inner[1], place="sublayer"),
            f"layers.{i}.scale": Leaf((F // 4,), "norm", "ffn", Fill(0.5), place="sublayer"),
        }
    leaves["norm"] = Leaf((D,), "norm", "norms", Fill(1.0))
    leaves["head"] = Leaf((V, D), "head", "head", Draw(0.3), Cut(0, None))

    def block(params, x):
        h = ops.enter(x)
        counts = torch.arange(1, h.shape[1] + 1, dtype=h.dtype)[:, None]
        inner = ops.linear(h.cumsum(1) / counts, params["w1"]).relu().unflatten(-1, (-1, F // 4)) * params["scale"]
        return x + ops.linear_out(inner.flatten(-2), params["w2"])

    block = wrap_block(block)

    def hidden(params, tokens, *, segment_ids=None):
        x = ops.embedding(tokens, params["embedding"])
        for layer in params["layers"]:
            x = block(layer, x)
        return ops.final(ops.rms_norm(x, params["norm"], 1e-5))

    def loss(params, batch):
        h = hidden(params, batch["tokens"])
        value, nll = ops.linear_cross_entropy(
            h, params["head"], batch["targets"], weights=batch["weights"], denominator=batch["denominator"]
        )
        return value, {"nll": nll}

    def log_probs(params, batch):
        return ops.log_probs(hidden(params, batch["tokens"]), params["head"], batch["targets"])

    def absent(*args, **kwargs):
        raise NotImplementedError("this model is not for decoding")

    return Model(
        partial(init_leaves, leaves=leaves), leaves, hidden, lambda params: params["head"], absent, loss, log_probs,
        absent, absent, absent, absent, V, T, None,
    )  # fmt: skip


MODELS = {
    "means": means,
    "ours": partial(transformer.make, CFG),
    "own parts": partial(transformer.make, own_parts.config()),
}


def next_token(model, params, batch):
    return model.loss(params["model"], {k: batch[k] for k in ("tokens", "targets", "weights", "denominator")})


def preference(model, params, batch):
    """Rows 0, 2, ... are preferred to rows 1, 3, ...; the reference has no gradient."""
    both = {"tokens": batch["tokens"], "targets": batch["targets"]}
    policy = model.log_probs(params["model"], both)[0].sum(-1)
    with torch.no_grad():
        reference = model.log_probs(params["reference"], both)[0].sum(-1)
    margin = (policy - reference).unflatten(0, (-1, 2))
    losses = -torch.nn.functional.logsigmoid(0.1 * (margin[:, 0] - margin[:, 1]))
    return losses.sum() / batch["denominator"], {"margin": margin.detach().sum()}


def policy_gradient(model, params, batch):
    log_p, entropy = model.log_probs(params["model"], {"tokens": batch["tokens"], "targets": batch["targets"]})
    value = (batch["weights"] * (log_p * batch["advantages"] + 0.01 * entropy)).sum()
    return -value / batch["denominator"], {"entropy": entropy.detach().sum()}


def classifier(model, params, batch):
    """A matrix of one's own, used as any tensor is."""
    logits = model.hidden(params["model"], batch["tokens"])[:, -1] @ params["head"]["weight"].T + params["head"]["bias"]
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    return nll / batch["denominator"], {"nll": nll.detach()}


LOSSES = {f.__name__: f for f in (next_token, preference, policy_gradient, classifier)}


def table_of(model, loss):
    """The leaf table of everything that is trained."""
    table = with_prefix("model", model.leaves)
    if loss == "preference":
        table |= with_prefix("reference", model.leaves)
    if loss == "classifier":
        table["head.weight"] = Leaf((CLASSES, D), "head", "head", Draw(0.3), place="outside")
        table["head.bias"] = Leaf((CLASSES,), "bias", "head", Fill(0.1), place="outside")
    return table


def batch_of(rank, size, step):
    key = random.fold_in(random.key(3), step)
    x = random.randint(key, (8, T + 1), 0, V)
    weights = random.uniform(random.fold_in(key, 1), (8, T)).double()
    batch = {
        "tokens": x[:, :-1].contiguous(), "targets": x[:, 1:].contiguous(), "weights": weights,
        "advantages": random.normal(random.fold_in(key, 2), (8, T)).double(),
        "labels": random.randint(random.fold_in(key, 3), (8,), 0, CLASSES),
    }  # fmt: skip
    n = 8 // size
    return {**{k: v[rank * n : (rank + 1) * n] for k, v in batch.items()}, "denominator": weights.sum()}


def made(way, model_name):
    """(model, strategy of its table, whether ranks see parts of the batch)."""
    make = MODELS[model_name]
    if way == "fsdp":
        return make(ops=fsdp.ops(REFERENCE), wrap_block=fsdp.gathered), lambda table: fsdp.strategy(like(table)), True
    if way == "fsdp bare":  # nothing said to the model: each matrix is gathered where it is used
        return make(), lambda table: fsdp.strategy(like(table)), True
    if way.startswith("tensor"):
        layout = tensor_parallel.Layout(V, sequence_parallel=way.endswith("sequence"))
        return make(ops=layout.ops(REFERENCE)), partial(tensor_parallel.strategy, layout=layout), False
    strategy = {"ddp": ddp.strategy, "zero": zero.strategy, "zero whole": partial(zero.strategy, whole=True)}[way]
    return make(), lambda table: strategy(), True


def trained(model, loss, strategy, table, batches):
    params = tree.cast(init_leaves(random.key(0), table), torch.float64)
    options = {"strategy": strategy, "max_norm": 0.5, "precision": F64}
    step = make_step(partial(LOSSES[loss], model), adamw(), schedules.constant(1e-2), **options)
    state = init_state(params, adamw(), F64, strategy)
    rows = []
    for i in range(3):
        state, metrics = step(state, batches(i))
        rows.append(metrics)
    return strategy.unshard(state.params), rows


def on_rank(way, model_name, loss):
    model, strategy_of, is_cut = made(way, model_name)
    plain = MODELS[model_name]()
    table = table_of(plain, loss)
    expected, theirs = trained(plain, loss, ALONE, table, lambda i: batch_of(0, 1, i))
    place = (rank_of(None), size_of(None)) if is_cut else (0, 1)
    found, rows = trained(model, loss, strategy_of(table), table, lambda i: batch_of(*place, i))
    assert_close(found, expected, 1e-8, 1e-10)  # AdamW divides by roots of small numbers
    for a, b in zip(rows, theirs, strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


WAYS = ("ddp", "zero", "zero whole", "fsdp", "fsdp bare", "tensor", "tensor sequence")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_any_model_and_any_loss(way, model_name, loss):
    run(on_rank, way, model_name, loss)


def on_rank_mean(way):
    """Of a batch that has no targets nobody can know the denominator: a mean over each rank's rows is refused."""

    def mean(params, batch):
        return (batch["x"] @ params["w"]).square().mean(), {}

    strategy = ddp.strategy() if way == "ddp" else fsdp.strategy({"w": torch.empty(4, 2)})
    step = make_step(mean, adamw(), schedules.constant(1e-2), strategy=strategy)
    step(init_state({"w": torch.ones(4, 2)}, adamw(), strategy=strategy), {"x": torch.ones(6, 4) + rank_of(None)})


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_mean_over_a_batch_without_targets_is_refused(way):
    with pytest.raises(RankError, match="the loss is a mean over its own microbatch") as error:
        run(on_rank_mean, way)
    assert sorted(error.value.errors) == [0, 1]
