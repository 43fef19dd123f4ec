"""Gradients, rematerialisation and accumulation, as functions of functions.

`value_and_grad` is reverse mode through torch.autograd. It composes with torch.func: `torch.func.vmap(grad(f))` gives
per-sample gradients, `torch.func.jvp` of `grad(f)` a Hessian-vector product, `torch.func.jacrev` of `grad(f)` the
Hessian, and `torch.func.grad` of a function that calls `grad` the gradient through that gradient. In a tree of purelm
None is an absent leaf, while torch.func refuses None as an input, so pass the leaves as a flat list:

    trained, fixed = tree.partition(lambda path, x: path.startswith("lora"), params)   # None in the holes
    leaves, form = tree.flatten(trained)                                               # a list of tensors
    gradient = lambda *xs: tree.leaves(grad(lambda t: loss(tree.combine(t, fixed)))(tree.unflatten(form, list(xs))))
    _, product = torch.func.jvp(gradient, tuple(leaves), tuple(direction))

Inside torch.compile, `value_and_grad` and `accumulate` break the graph. The differentiated function is compiled as a
forward and a backward graph by AOTAutograd, whose partitioner chooses what is kept for backward, and the code after the
gradient is a graph of its own. From torch 2.13 on dynamo could trace torch.autograd.grad into a single graph instead,
but without a partitioner: for a small Transformer this took 2.6 times as long to compile and ran 4 % slower.
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

    f returns a 0-d floating value, or (value, aux) if has_aux; the result is (value, grads), or ((value, aux), grads).
    grads has the structure of the argument, with zeros at a floating leaf that the value does not depend on and None at
    a leaf that is not floating; for a tuple of argnums it is a tuple of such trees. f is called with detached leaves
    (no data is copied), so the arguments' own requires_grad and .grad stay unchanged, and a tensor at two places of the
    argument gets a gradient for each place. Value, aux and gradients are detached.

    Inside a torch.func transform (vmap, jvp, grad, jacrev, ...) torch.func.grad_and_value computes the same, and the
    results are not detached from that transform. Elsewhere a second derivative is an error: take the outer one with
    `torch.func.grad`.

    Args:
        watch: called before f with the list of detached floating leaves; it may register hooks on them, as data
            parallelism does to send gradients while backward runs. Backward accumulates gradients in the leaves' .grad
            (None for a leaf that the value does not depend on). The function that `watch` returned is called after
            backward and returns the gradients of all leaves. ValueError inside a torch.func transform, whose tensors
            have no hooks.

    >>> loss = lambda params, x: ((params["w"] * x) ** 2).sum()
    >>> value_and_grad(loss)({"w": torch.tensor([1.0, 2.0])}, torch.tensor([3.0, 1.0]))
    (tensor(13.), {'w': tensor([18.,  4.])})
    """
    numbers = _argument_numbers(argnums)
    function = own_cache(f)

    def body(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if torch.is_inference_mode_enabled():  # records no graph, not even under enable_grad
            raise ValueError(
                "value_and_grad: under torch.inference_mode() there are no gradients; use torch.no_grad() instead"
            )
        flat, treedef = optree.tree_flatten(_differentiated(args, numbers))
        at = [k for k, x in enumerate(flat) if tree.is_floating(x)]

        def arguments(inputs: list[Tensor]) -> list[Any]:
            """All arguments of f, with the floating leaves of the differentiated ones replaced by `inputs`."""
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
    """The function that returns f's gradient, or (gradient, aux) if has_aux; arguments as for `value_and_grad`.

    >>> grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor([ 3., 12.])
    """
    both = value_and_grad(f, argnums, has_aux)

    def body(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out, grads = call(both, *args, **kwargs)
        return (grads, out[1]) if has_aux else grads

    return between_graphs(body, like=f)


def remat(f: Callable[..., Any], policy: Callable[[Any], bool] | None = None) -> Callable[..., Any]:
    """f with the same values and gradients, whose intermediate results are not kept but computed again in backward.

    f's arguments are kept, and the results of operators for which policy(op) is true; op is an OpOverload such as
    torch.ops.aten.mm.default (`save_matmuls` is a policy). f must be pure: the state of torch's global generator is not
    restored for the second computation. Does not work under torch.func, which has no saved-tensor hooks; call f itself
    there. Chen et al., "Training deep nets with sublinear memory cost" (2016).

    >>> block = remat(lambda w, x: torch.tanh(x @ w))
    """

    def rematerialised(*args: Any, **kwargs: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if policy is not None:
            options["context_fn"] = functools.partial(_selective_contexts, policy)
        # The leaves are direct arguments of checkpoint, since it passes only those through saved-tensor hooks, and not
        # tensors inside trees. FSDP needs the hooks: they drop gathered parameters, and gather them again in backward.
        leaves, treedef = tree.flatten((args, kwargs))

        def call(*leaves: Any) -> Any:
            args, kwargs = tree.unflatten(treedef, list(leaves))
            return f(*args, **kwargs)

        return checkpoint(call, *leaves, **options)

    return rematerialised


def save_matmuls(op: Any) -> bool:
    """A policy for `remat`: keep the results of matrix products and of attention, compute the rest again."""
    return op in _matmuls() or str(op) == "purelm.flash_attention_fwd.default"


@not_traced
def accumulate(f: Callable[..., Any], n_microbatches: int) -> Callable[..., Any]:
    """The function (params, batch) -> sum of f(params, microbatch) over n_microbatches equal parts of the batch.

    The batch's leaves are split along axis 0; 0-d leaves are passed whole to every call. All leaves of f's result (a
    tree of tensors: value, metrics, gradients) are summed. The sum equals f(params, batch) if f divides by a
    denominator of the whole batch, such as batch["denominator"]; if f is a mean over its microbatch, the sum is
    n_microbatches times too large. One microbatch's activations are alive at a time.

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
                # Leaf by leaf, dropping each summand at once, so that two trees of gradients are held and not three.
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
    """The arguments to differentiate; ValueError if one of them has no floating leaf."""
    if max(numbers) >= len(args):
        raise ValueError(f"value_and_grad: argnums has {max(numbers)}, but {len(args)} positional arguments were given")
    for i in numbers:
        if not any(tree.is_floating(x) for x in optree.tree_leaves(args[i])):
            raise ValueError(f"value_and_grad: argument {i} has no floating tensor to differentiate")
    return tuple(args[i] for i in numbers)


def _fresh_leaf(x: Tensor) -> Tensor:
    """A leaf of a new autograd graph that shares x's data; ValueError if that would cut an outer graph."""
    inner = x.grad_fn is not None or getattr(x, _LEAF, False)
    if inner and torch.is_grad_enabled():
        raise ValueError(
            "value_and_grad: an argument to differentiate is itself the result of a differentiated computation, which "
            "would be cut off: detach it, or make the outer derivative torch.func.grad's, which differentiates through "
            "this one"
        )
    leaf = x.detach().requires_grad_()
    setattr(leaf, _LEAF, True)  # so that a nested call can tell it from the user's tensors that require grad
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
    """(value, aux, gradients) of f by torch.func.grad_and_value.

    torch.func allows only tensors in aux, so other leaves are passed around it in a list.
    """
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
