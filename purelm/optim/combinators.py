"""Functions that make an optimizer of optimizers: one after another, one for each part of the tree, another lr."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from purelm import tree
from purelm.optim.base import Mask, Optimizer, Tree, chosen_by, made_by, step_of, unzip, with_step
from purelm.optim.checks import check_lr, check_optimizer, check_update

__all__ = [
    "LabelledState",
    "PartitionedState",
    "add_weight_decay",
    "chain",
    "frozen",
    "labelled",
    "partitioned",
    "scale_lr",
]


class PartitionedState(NamedTuple):
    """State of `partitioned`: each part's own, over a tree with None where the other part has the leaf."""

    yes: Any
    no: Any


def chain(*optimizers: Optimizer) -> Optimizer:
    """Each one's updates are the next one's gradients; the state is the tuple of their states.

    All of them see the same params and lr, so at most one may be a full optimizer: the last.

    >>> from purelm.optim import adamw, clip_by_global_norm
    >>> optimizer = chain(clip_by_global_norm(1.0), adamw(weight_decay=0.1))
    """

    for i, o in enumerate(optimizers):
        if isinstance(o, list) or (isinstance(o, tuple) and not hasattr(o, "update")):
            raise ValueError(
                f"chain: argument {i} is a {type(o).__name__}; give the optimizers one by one: chain(a, b)"
            )
        check_optimizer(f"chain: argument {i}", o)

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple([o.init(params) for o in optimizers])

    def check(state: Any) -> None:
        if type(state) is not tuple:
            raise ValueError(f"chain: state is of type {type(state).__name__}; the tuple of its optimizers' is needed")
        if len(state) != len(optimizers):
            raise ValueError(f"chain: state has {len(state)} entries, the chain has {len(optimizers)} optimizers")

    def update(grads: Tree, state: tuple[Any, ...], params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        check(state)
        new_state = []
        for i, o in enumerate(optimizers):
            grads, s = o.update(grads, state[i], params, lr)
            new_state.append(s)
        return grads, tuple(new_state)

    last = step_of(optimizers[-1]) if optimizers else None
    if last is None:
        return made_by(Optimizer(init, update), chain, *optimizers)

    def step_(grads: Tree, state: tuple[Any, ...], params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        check(state)
        new_state = []
        for o, s in zip(optimizers[:-1], state, strict=False):
            grads, s = o.update(grads, s, params, lr)
            new_state.append(s)
        params, s = last(grads, state[-1], params, lr)
        return params, (*new_state, s)

    return made_by(Optimizer(init, with_step(update, step_)), chain, *optimizers)


def partitioned(predicate: Mask, yes: Optimizer, no: Optimizer) -> Optimizer:
    """`yes` updates the parameters that `predicate(path, param)` chooses, `no` all the others.

    Each sees a tree with None in place of the other's leaves. `predicate` may also be a tree of bools. For more than
    two kinds of parameters see `labelled`.

    >>> from purelm.optim import adamw, sgd
    >>> optimizer = partitioned(lambda path, p: "embeddings" in path, sgd(), adamw())
    """

    check_optimizer("partitioned: yes", yes)
    check_optimizer("partitioned: no", no)

    def split(chosen: Tree, t: Tree) -> tuple[Tree, Tree]:
        # The choice is made on params alone, so a predicate may look at values and dtypes, not only at paths.
        return (
            tree.map(lambda c, x: x if c else None, chosen, t),
            tree.map(lambda c, x: None if c else x, chosen, t),
        )

    def init(params: Tree) -> PartitionedState:
        p_yes, p_no = split(chosen_by(predicate, params), params)
        return PartitionedState(yes.init(p_yes), no.init(p_no))

    def update(grads: Tree, state: PartitionedState, params: Tree, lr: Tensor | float) -> tuple[Tree, PartitionedState]:
        check_update("partitioned", PartitionedState, grads, state, params, lr)
        chosen = chosen_by(predicate, params)
        (g_yes, g_no), (p_yes, p_no) = split(chosen, grads), split(chosen, params)
        u_yes, s_yes = yes.update(g_yes, state.yes, p_yes, lr)
        u_no, s_no = no.update(g_no, state.no, p_no, lr)
        return tree.combine(u_yes, u_no), PartitionedState(s_yes, s_no)

    first, second = step_of(yes), step_of(no)
    if first is None or second is None:
        return made_by(Optimizer(init, update), partitioned, predicate, yes, no)

    def step_(grads: Tree, state: PartitionedState, params: Tree, lr: Tensor | float) -> tuple[Tree, PartitionedState]:
        check_update("partitioned", PartitionedState, grads, state, params, lr)
        chosen = chosen_by(predicate, params)
        (g_yes, g_no), (p_yes, p_no) = split(chosen, grads), split(chosen, params)
        p_yes, s_yes = first(g_yes, state.yes, p_yes, lr)
        p_no, s_no = second(g_no, state.no, p_no, lr)
        return tree.combine(p_yes, p_no), PartitionedState(s_yes, s_no)

    return made_by(Optimizer(init, with_step(update, step_)), partitioned, predicate, yes, no)


class LabelledState(NamedTuple):
    """State of `labelled`: each optimizer's own, over a tree with None where another one has the leaf."""

    states: dict[str, Any]  # by label


def labelled(label: Callable[[str, Tensor], str] | Tree, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """`optimizers[label(path, param)]` updates each parameter: `partitioned` for any number of kinds.

    `label` may also be a tree of strings of the form of params. Each optimizer sees a tree with None in place of the
    others' leaves; one that no parameter has the label of only counts its steps. ValueError names a parameter whose
    label is not among those of `optimizers`. optax.partition (formerly multi_transform) is the same idea.

    >>> from purelm.optim import adamw, lion, sgd
    >>> def kind(path, p):
    ...     return "vector" if p.ndim < 2 else "embedding" if "embeddings" in path else "matrix"
    >>> optimizer = labelled(kind, {"matrix": lion(), "embedding": sgd(), "vector": adamw(weight_decay=0.0)})
    >>> params = {"token_embeddings": torch.ones(3, 2), "norm": torch.ones(2)}
    >>> optimizer.update(params, optimizer.init(params), params, 0.5)[0]["norm"]
    tensor([-0.5000, -0.5000])
    """
    parts = dict(optimizers)
    for name, o in parts.items():
        if not isinstance(name, str):
            raise ValueError(f"labelled: the label {name!r} is a {type(name).__name__}; labels are strings")
        check_optimizer(f"labelled: optimizers[{name!r}]", o)

    def labels_of(params: Tree) -> Tree:
        def checked(path: str, name: Any) -> str:
            if name not in parts:
                raise ValueError(f"labelled: the label of {path!r} is {name!r}; optimizers has {sorted(parts)}")
            return name

        if callable(label):
            return tree.map_with_path(lambda path, p: checked(path, label(path, p)), params)
        return tree.map_with_path(lambda path, p, name: checked(path, name), params, label)

    def of(name: str, labels: Tree, t: Tree) -> Tree:
        return tree.map(lambda found, x: x if found == name else None, labels, t)

    def init(params: Tree) -> LabelledState:
        labels = labels_of(params)
        return LabelledState({name: o.init(of(name, labels, params)) for name, o in parts.items()})

    def each(
        functions: Mapping[str, Callable[..., Any]], grads: Tree, state: LabelledState, params: Tree, lr: Any
    ) -> tuple[Tree, LabelledState]:
        check_update("labelled", LabelledState, grads, state, params, lr)
        labels = labels_of(params)
        found, states = [tree.map(lambda p: None, params)], {}
        for name, f in functions.items():
            result, states[name] = f(of(name, labels, grads), state.states[name], of(name, labels, params), lr)
            found.append(result)
        return tree.combine(*found), LabelledState(states)

    updates = {name: o.update for name, o in parts.items()}

    def update(grads: Tree, state: LabelledState, params: Tree, lr: Tensor | float) -> tuple[Tree, LabelledState]:
        return each(updates, grads, state, params, lr)

    steps = {name: step for name, o in parts.items() if (step := step_of(o)) is not None}
    if len(steps) < len(parts):
        return made_by(Optimizer(init, update), labelled, label, parts)

    def step_(grads: Tree, state: LabelledState, params: Tree, lr: Tensor | float) -> tuple[Tree, LabelledState]:
        return each(steps, grads, state, params, lr)

    return made_by(Optimizer(init, with_step(update, step_)), labelled, label, parts)


def frozen() -> Optimizer:
    """No optimizer: it leaves its parameters as they are and keeps nothing of them; a part of `labelled`.

    Their gradients are computed nevertheless: to save that, differentiate by the other parameters only
    (`tree.partition`). optax.set_to_zero is the same for gradients.

    >>> from purelm.optim import adamw, apply_updates
    >>> optimizer = labelled(lambda path, p: path.split(".")[0], {"head": adamw(), "body": frozen()})
    >>> params = {"body": {"w": torch.ones(2)}, "head": {"w": torch.ones(2)}}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params, 0.1)
    >>> updates["body"], state.states["body"], apply_updates(params, updates)["body"]
    ({'w': None}, (), {'w': tensor([1., 1.])})
    """

    def update(grads: Tree, state: tuple[()], params: Tree, lr: Tensor | float) -> tuple[Tree, tuple[()]]:
        return tree.map(lambda p: None, params), state

    def step_(grads: Tree, state: tuple[()], params: Tree, lr: Tensor | float) -> tuple[Tree, tuple[()]]:
        return params, state

    return made_by(Optimizer(lambda params: (), with_step(update, step_)), frozen)


def scale_lr(optimizer: Optimizer, factor: float) -> Optimizer:
    """The optimizer with lr * factor: one schedule for parts that need different learning rates.

    >>> from purelm.optim import adamw, muon, partitioned, sgd
    >>> optimizer = partitioned(lambda path, p: p.ndim == 2, scale_lr(muon(), 20.0), adamw())
    >>> scale_lr(sgd(), 0.5).update(torch.ones(2), sgd().init(torch.ones(2)), torch.ones(2), 0.1)[0]
    tensor([-0.0500, -0.0500])
    """
    check_optimizer("scale_lr: optimizer", optimizer)
    step = step_of(optimizer)

    def update(grads: Tree, state: Any, params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        check_lr("scale_lr", lr)
        return optimizer.update(grads, state, params, lr * factor)

    if step is None:
        return made_by(Optimizer(optimizer.init, update), scale_lr, optimizer, factor)

    def step_(grads: Tree, state: Any, params: Tree, lr: Tensor | float) -> tuple[Tree, Any]:
        return step(grads, state, params, lr * factor)

    return made_by(Optimizer(optimizer.init, with_step(update, step_)), scale_lr, optimizer, factor)


def add_weight_decay(weight_decay: float, mask: Mask = None) -> Optimizer:
    """Gradient of an L2 penalty: g + weight_decay * p (coupled decay; `adamw` and `lion` have the decoupled one).

    `chain(add_weight_decay(0.1), adam())` is torch.optim.Adam(weight_decay=0.1).

    >>> params = {"w": torch.tensor([2.0])}
    >>> add_weight_decay(0.1).update({"w": torch.tensor([1.0])}, (), params, 0.0)[0]
    {'w': tensor([1.2000])}
    """

    def update(grads: Tree, state: tuple[()], params: Tree, lr: Tensor | float) -> tuple[Tree, tuple[()]]:
        def leaf(rate: float, p: Tensor, g: Tensor | None) -> tuple:
            return (g if g is None or not rate else g.add(p, alpha=rate).to(g.dtype),)

        (decayed,) = unzip(1, leaf, params, grads, weight_decay=weight_decay, mask=mask)
        return decayed, state

    return made_by(Optimizer(lambda params: (), update), add_weight_decay, weight_decay, mask)
