"""Gradients, rematerialisation and accumulation, as functions of functions.

`value_and_grad` is reverse mode through torch.autograd. It composes with torch.func: `torch.func.vmap(grad(f))` gives
per-sample gradients, `torch.func.jvp` of `grad(f)` a Hessian times a vector, `torch.func.jacrev` of it the Hessian,
and `torch.func.grad` of a function that calls `grad` a gradient through a gradient. torch.func itself takes None for a
leaf and refuses it, while here None is the absence of one; give torch.func the leaves alone:

    trained, fixed = tree.partition(lambda path, x: path.startswith("lora"), params)   # None in the holes
    leaves, form = tree.flatten(trained)                                               # a list of tensors
    gradient = lambda *xs: tree.leaves(grad(lambda t: loss(tree.combine(t, fixed)))(tree.unflatten(form, list(xs))))
    _, product = torch.func.jvp(gradient, tuple(leaves), tuple(direction))

Inside torch.compile, `value_and_grad` and `accumulate` end a graph: the differentiated function becomes a forward
and a backward graph, with torch's partitioner between them, and what follows another. Dynamo can trace
torch.autograd.grad into one graph from torch 2.13 on, but that one has no partitioner: for a small Transformer it
took 2.6 times as long to compile and ran 4 % slower.
"""

import functools
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from purelm import tree
from purelm.caches import memo
from purelm.transforms.boundary import between_graphs, not_traced, own_cache
from purelm.transforms.donation import in_stages, jit
from purelm.transforms.graph import cuda_graph

__all__ = ["accumulate", "cuda_graph", "grad", "in_stages", "jit", "remat", "save_matmuls", "value_and_grad"]


Watch = Callable[[list[Tensor]], Callable[[], list[Tensor]]]


@not_traced
def value_and_grad(
    f: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    watch: Watch | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """The function that returns f's value and its gradient with respect to the arguments `argnums`.

    f returns a 0-d floating tensor, or (that, aux) if has_aux; the result is (value, grads), or
    ((value, aux), grads). grads has the structure of the argument (a tuple of such for a tuple of argnums): zeros
    for a floating leaf that the value does not depend on, None for a leaf that is not floating. f sees detached
    leaves (no data is copied): the arguments keep their own requires_grad and .grad, and a tensor that stands in
    two places has a gradient for each. Value, aux and gradients are detached.

    Inside of a torch.func transform (vmap, jvp, grad, jacrev, ...) the same contract is kept by
    torch.func.grad_and_value, and the results stay functions of whatever is differentiated further out. Without such a
    transform around it a second derivative is an error: write `torch.func.grad` for the outer one.

    watch: called before f with the detached floating leaves, in order; it may put hooks on them (data parallelism
    sends gradients while backward runs). Backward leaves gradients in their .grad, None where the value does not
    depend on a leaf, and the function that watch returned, called when backward is over, gives those of all leaves.
    ValueError inside of a torch.func transform, where tensors have no hooks.

    >>> loss = lambda params, x: ((params["w"] * x) ** 2).sum()
    >>> value_and_grad(loss)({"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 1.0]))
    (tensor(13.), {'w': tensor([18.,  4.])})
    """
    numbers = _argument_numbers(argnums)
    function = own_cache(f)

    def body(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.is_inference_mode_enabled():  # no graph is recorded there, whatever enable_grad says
            raise ValueError(
                "value_and_grad: under torch.inference_mode() there are no gradients; torch.no_grad() is no obstacle"
            )
        flat, treedef = optree.tree_flatten(_differentiated(args, numbers))
        at = [k for k, x in enumerate(flat) if tree.is_floating(x)]

        def arguments(inputs: list[Tensor]) -> list[Any]:
            """All arguments of f, these tensors in the places of the floating leaves."""
            for k, x in zip(at, inputs, strict=True):
                flat[k] = x
            new_args = list(args)
            for i, arg in zip(numbers, treedef.unflatten(flat), strict=True):
                new_args[i] = arg
            return new_args

        if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
            if watch is not None:
                raise ValueError("value_and_grad: watch must be None inside of a torch.func transform")

            def of_inputs(inputs: list[Tensor]) -> Any:
                return call(function, *arguments(inputs), **kwargs)

            value, aux, found = _under_torch_func(of_inputs, [flat[k] for k in at], has_aux)
        else:
            value, aux, found = differentiate(call, arguments, [_fresh_leaf(flat[k]) for k in at], kwargs)
        grads: list[Any] = [None] * len(flat)
        for k, g in zip(at, found, strict=True):
            grads[k] = g
        by_argument = treedef.unflatten(grads)
        return (value, aux) if has_aux else value, by_argument[0] if isinstance(argnums, int) else by_argument

    def differentiate(
        call: Callable[..., Any], arguments: Callable[[list[Tensor]], list[Any]], inputs: list[Tensor], kwargs: Any
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """(value, aux, gradients) by torch.autograd, all detached."""
        new_args = arguments(inputs)
        finish = None if watch is None else watch(inputs)
        with torch.enable_grad():
            value, aux = _value_and_aux(call(function, *new_args, **kwargs), has_aux)
        aux = optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux)
        if finish is not None:
            if value.requires_grad:
                torch.autograd.backward(value, inputs=inputs)
            found = tuple(finish())
        elif value.requires_grad:
            found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(x) for x in inputs)
        return value.detach(), aux, [g.detach() for g in found]

    return between_graphs(body, like=f)


@not_traced
def grad(f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The function that returns f's gradient, or (gradient, aux) if has_aux; otherwise as `value_and_grad`.

    >>> grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor([ 3., 12.])
    """
    both = value_and_grad(f, argnums, has_aux)

    def body(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out, grads = call(both, *args, **kwargs)
        return (grads, out[1]) if has_aux else grads

    return between_graphs(body, like=f)


def remat(f: Callable[..., Any], policy: Callable[[Any], bool] | None = None) -> Callable[..., Any]:
    """f with the same values and gradients, whose intermediate results are computed again in the backward pass.

    Kept are f's arguments, and the results of operators for which policy(op) is true, op being an OpOverload such
    as torch.ops.aten.mm.default (`save_matmuls` is a policy). f must be pure; the global generator's state is not
    restored, since nothing here draws from it. Not under torch.func, which has no hooks for saved tensors: leave
    remat out there. Chen et al., "Training deep nets with sublinear memory cost" (2016).

    >>> block = remat(lambda w, x: torch.tanh(x @ w))
    """

    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if policy is not None:
            options["context_fn"] = functools.partial(_selective_contexts, policy)
        # checkpoint gets the leaves one by one: it hands saved tensors to hooks, but only its direct arguments, not
        # tensors inside of trees (FSDP's hooks drop gathered parameters, and gather them again).
        leaves, treedef = tree.flatten((args, kwargs))

        def call(*leaves: Any) -> Any:
            args, kwargs = tree.unflatten(treedef, list(leaves))
            return f(*args, **kwargs)

        return checkpoint(call, *leaves, **options)

    return rematerialised


def save_matmuls(op: Any) -> bool:
    """A policy of `remat`: keep the results of matrix products and of attention, compute the rest again."""
    return op in _matmuls() or str(op) == "purelm.flash_attention_fwd.default"


@not_traced
def accumulate(f: Callable[..., Any], n_microbatches: int) -> Callable[..., Any]:
    """The function (params, batch) -> sum of f(params, microbatch) over n_microbatches equal parts of the batch.

    Leaves of the batch that have an axis are cut on axis 0, 0-d leaves are passed on whole. Everything that f
    returns (a tree of tensors: value, metrics, gradients) is summed. That equals f(params, batch) when f divides by
    a denominator of the whole batch, such as batch["denominator"]; means over each part would come out n times too
    large. One microbatch's activations are alive at a time.

    >>> double = accumulate(lambda params, batch: (params * batch["x"]).sum(), 2)
    >>> double(torch.tensor(2.0), {"x": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    tensor(20.)
    """
    if not isinstance(n_microbatches, int) or n_microbatches < 1:
        raise ValueError(f"accumulate: n_microbatches is {n_microbatches!r}; an int of at least 1 is needed")
    function = own_cache(f)

    def body(call: Callable[..., Any], params: Any, batch: Any) -> Any:
        pieces = _split_batch(batch, n_microbatches)
        total, treedef = tree.flatten(call(function, params, pieces[0]))
        for piece in pieces[1:]:
            part, other = tree.flatten(call(function, params, piece))
            if other != treedef:
                raise ValueError("accumulate: f's results differ in structure between microbatches")
            for i in range(len(total)):
                # Leaf by leaf, and each part is dropped at once: two trees of gradients are held and not three.
                total[i] = total[i] + part[i]
                part[i] = None
        return tree.unflatten(treedef, total)

    return between_graphs(body, like=f)


def _argument_numbers(argnums: int | tuple[int, ...]) -> tuple[int, ...]:
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ValueError(f"value_and_grad: argnums is {argnums!r}; distinct positions from 0 are needed")
    return numbers


def _differentiated(args: tuple, numbers: tuple[int, ...]) -> tuple:
    """The arguments to differentiate, each of which has a floating leaf."""
    if max(numbers) >= len(args):
        raise ValueError(f"value_and_grad: argnums has {max(numbers)}, but {len(args)} positional arguments came")
    for i in numbers:
        if not any(tree.is_floating(x) for x in optree.tree_leaves(args[i])):
            raise ValueError(f"value_and_grad: argument {i} has no floating tensor to differentiate")
    return tuple(args[i] for i in numbers)


def _fresh_leaf(x: Tensor) -> Tensor:
    """A leaf of a new graph with x's data."""
    inner = x.grad_fn is not None or getattr(x, _LEAF, False)
    if inner and torch.is_grad_enabled():
        raise ValueError(
            "value_and_grad: a differentiated argument is itself the result of a differentiated computation, which "
            "would be cut off; detach it, or make the outer derivative torch.func.grad's, which sees through this one"
        )
    leaf = x.detach().requires_grad_()
    setattr(leaf, _LEAF, True)  # so that a nested call can tell it from a parameter of the user's
    return leaf


_LEAF = "_leaf_of_value_and_grad"


def _value_and_aux(out: Any, has_aux: bool) -> tuple[Tensor, Any]:
    aux = None
    if has_aux:
        if not isinstance(out, tuple) or len(out) != 2:
            raise ValueError(f"value_and_grad: has_aux needs f to return (value, aux); it returned {type(out)}")
        out, aux = out
    if not isinstance(out, Tensor):
        raise ValueError(f"value_and_grad: f returned {type(out)}; a 0-d floating tensor is needed")
    if out.ndim != 0 or not out.dtype.is_floating_point:
        raise ValueError(
            f"value_and_grad: f returned shape {tuple(out.shape)} and {out.dtype}; a 0-d floating tensor is needed"
        )
    return out, aux


def _under_torch_func(
    f: Callable[[list[Tensor]], Any], inputs: list[Tensor], has_aux: bool
) -> tuple[Tensor, Any, list[Tensor]]:
    """(value, aux, gradients) of f by torch.func, whose own aux may hold tensors alone: the rest goes around it."""
    others: list[Any] = []
    form: Any = None

    def wrapped(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        nonlocal form
        value, aux = _value_and_aux(f(inputs), has_aux)
        others[:], form = optree.tree_flatten(aux)
        return value, [x for x in others if isinstance(x, Tensor)]

    grads, (value, tensors) = torch.func.grad_and_value(wrapped, has_aux=True)(inputs)
    rest = iter(tensors)
    aux = optree.tree_unflatten(form, [next(rest) if isinstance(x, Tensor) else x for x in others])
    return value, aux, grads


def _split_batch(batch: Any, n: int) -> list[Any]:
    if n == 1:
        return [batch]
    sizes: dict[str, int] = {}
    tree.map_with_path(lambda path, x: sizes.update({path: x.shape[0]}) if x.ndim else None, batch)
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) % n:
        raise ValueError(
            f"accumulate: sizes of axis 0 are {sizes}; they must be equal and divisible by n_microbatches {n}"
        )
    size = next(iter(sizes.values())) // n

    def piece(i: int) -> Any:
        return tree.map(lambda x: x[i * size : (i + 1) * size] if x.ndim else x, batch)

    return [piece(i) for i in range(n)]


def _selective_contexts(policy: Callable[[Any], bool]) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def decide(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if policy(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(decide)


@memo(1)
def _matmuls() -> frozenset[Any]:
    aten = torch.ops.aten
    return frozenset(
        [
            aten.mm.default,
            aten.bmm.default,
            aten.addmm.default,
            aten.baddbmm.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )
