"""LoRA. Oracles: W + s B A written out; the chain rule; a layer that adds s B (A x) to W x."""

import math

import pytest
import torch

from purelm import random, tree
from purelm.align import lora
from purelm.models import transformer
from purelm.models.leaves import of_kind
from purelm.optim import adamw, schedules
from purelm.train import init_state, make_step

CFG = transformer.Config(vocab_size=29, context_length=16, d_model=16, n_layers=2, n_heads=2, d_ff=24)
MODEL = transformer.make(CFG)
PARAMS = MODEL.init(random.key(0), torch.float64)
BATCH = {"tokens": torch.arange(24).view(2, 12) % 29, "targets": (torch.arange(24).view(2, 12) * 5 + 1) % 29}


def moved(adapters):
    """B no longer 0."""
    return tree.map_with_path(lambda p, x: x + 0.1 if p.endswith(".b") else x, adapters)


def test_it_begins_as_the_model_and_only_chosen_matrices_change():
    adapters = lora.init(random.key(1), PARAMS, 4, of_kind(MODEL.leaves, "matrix"), dtype=torch.float64)
    same = lora.merge(PARAMS, adapters, alpha=8.0)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(same), tree.leaves(PARAMS), strict=True))
    chosen = [p for p, leaf in MODEL.leaves.items() if leaf.kind == "matrix"]
    assert lora.n_adapted(adapters) == len(chosen) == 2 * 7
    merged = dict(zip(tree.paths(PARAMS), tree.leaves(lora.merge(PARAMS, moved(adapters), alpha=8.0)), strict=True))
    for path, w in zip(tree.paths(PARAMS), tree.leaves(PARAMS), strict=True):
        if path not in chosen:
            assert merged[path] is w
            continue
        node = adapters
        for name in path.split("."):
            node = node[int(name)] if isinstance(node, list) else node[name]
        assert node.a.abs().max() <= 1 / math.sqrt(w.shape[1]) and node.a.std() > 0.4 / math.sqrt(w.shape[1])
        torch.testing.assert_close(merged[path], w + 8.0 / 4 * ((node.b + 0.1) @ node.a))


def test_gradients_by_the_chain_rule():
    """dA = s B^T dW, dB = s dW A^T, with dW the gradient of the merged matrix."""
    match = lambda path, w: path.endswith("q_proj.weight")  # noqa: E731
    adapters = moved(lora.init(random.key(1), PARAMS, 3, match, dtype=torch.float64))
    leaves, form = tree.flatten(adapters)
    leaves = [x.requires_grad_() for x in leaves]
    merged = lora.merge(PARAMS, tree.unflatten(form, leaves), alpha=6.0, rank_stabilized=True)
    targets = [layer["attn"]["q_proj"]["weight"] for layer in merged["layers"]]
    loss, _ = MODEL.loss(merged, BATCH)
    found = torch.autograd.grad(loss, [*leaves, *targets])
    s = 6.0 / math.sqrt(3)
    for i in range(2):
        a, b, dw = leaves[2 * i], leaves[2 * i + 1], found[4 + i]
        torch.testing.assert_close(found[2 * i], s * b.mT @ dw)
        torch.testing.assert_close(found[2 * i + 1], s * dw @ a.mT)


def test_training_moves_adapters_alone_and_the_merged_model_is_what_was_trained():
    params = tree.cast(PARAMS, torch.float32)
    adapters = lora.init(random.key(1), params, 2)
    assert lora.n_adapted(adapters) == 14

    def loss(adapters, batch):
        return MODEL.loss(lora.merge(params, adapters, alpha=4.0), batch)

    optimizer = adamw(weight_decay=0.0)
    before = tree.map(torch.clone, params)
    state, step = init_state(adapters, optimizer), make_step(loss, optimizer, schedules.constant(1e-2))
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(before), tree.leaves(params), strict=True))
    final, _ = MODEL.loss(lora.merge(params, state.params, alpha=4.0), BATCH)
    assert float(final) < losses[-1] + 0.05


def test_stacks_keys_and_dtypes():
    """A stack of matrices has one adapter each; a leaf's draw does not depend on the others; bf16 weights stay bf16."""
    params = {"experts": torch.zeros(3, 6, 4, dtype=torch.bfloat16), "w": torch.zeros(5, 4)}
    adapters = lora.init(random.key(0), params, 2, lambda path, w: w.ndim >= 2)
    assert adapters["experts"].a.shape == (3, 2, 4) and adapters["experts"].b.shape == (3, 6, 2)
    alone = lora.init(random.key(0), {"w": params["w"]}, 2, lambda path, w: True)
    assert torch.equal(alone["w"].a, adapters["w"].a)
    merged = lora.merge(params, moved(adapters), alpha=1.0)
    assert merged["experts"].dtype == torch.bfloat16 and merged["experts"].abs().max() > 0


SMALL = lora.Adapter(torch.ones(1, 2), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora.init(random.key(0), PARAMS, 0), "rank must be an int of at least 1, got 0"),
        (lambda: lora.init(random.key(0), PARAMS, 99), "rank 99 is more than the shorter side of layers.0.attn."),
        (lambda: lora.init(random.key(0), PARAMS, 2, lambda p, w: False), "match chooses no leaf of params"),
        (lambda: lora.init(random.key(0), PARAMS, 2, lambda p, w: True), r"layers.0.ln1.weight has shape \(16,\)"),
        (lambda: lora.merge(PARAMS, {"x": SMALL}, alpha=1.0), "adapters have x, which params have not"),
        (lambda: lora.merge({"w": torch.ones(2, 2)}, {"w": torch.ones(2)}, alpha=1.0), "must hold an Adapter or None"),
        (
            lambda: lora.merge({"w": torch.ones(2, 3)}, {"w": SMALL}, alpha=1.0),
            r"w has shape \(2, 3\), its adapter a \(1, 2\) and b \(2, 1\)",
        ),
        (lambda: lora.merge(PARAMS, {}, alpha=float("nan")), "alpha must be a finite number, got nan"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
