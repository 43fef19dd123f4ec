"""Ops with one known fault each, all of them else the function `right`."""

import torch
from torch.autograd.function import once_differentiable


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


ARGS = (draw(4, 3), draw(3, seed=1))


def right(x, w):
    """The reference of all the ops below: nothing of it is linear, and its rows and columns differ."""
    return torch.tanh(x * w) * torch.arange(1.0, 4.0, dtype=x.dtype, device=x.device)


def slopes(x, w):
    """dy / d(x w)."""
    return (1 - torch.tanh(x * w) ** 2) * torch.arange(1.0, 4.0, dtype=x.dtype, device=x.device)


def transformed():
    """Within torch.func, or in tracing."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def made(backward=None, jvp=None, vmap=None, saved=None):
    """`right` as an autograd.Function; what is not given is right. saved(x, w, y) is kept besides."""

    class Op(torch.autograd.Function):
        generate_vmap_rule = vmap is None

        @staticmethod
        def forward(x, w):
            return right(x, w)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.set_materialize_grads(jvp is not forgets_absent_tangents)
            if saved is not None and not transformed():
                ctx.saved = saved(*inputs, output)

    def plain_backward(ctx, g):
        x, w = ctx.saved_tensors
        d = g * slopes(x, w)
        return d * w, (d * x).reshape(-1, 3).sum(0)

    def plain_jvp(ctx, tx, tw):
        x, w = ctx.saved_tensors
        return slopes(x, w) * (tx * w + x * tw)

    Op.backward, Op.jvp = staticmethod(backward or plain_backward), staticmethod(jvp or plain_jvp)
    if vmap is not None:
        Op.vmap = staticmethod(vmap)
    # dynamo refuses a Function that has a jvp (torch 2.13).
    return lambda x, w: right(x, w) if torch.compiler.is_compiling() else Op.apply(x, w)


def wrong_factor(ctx, g):
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, 1.001 * (d * x).sum(0)


def wrong_if_alone(ctx, g):
    """Mistakes the needs of one argument for the other's."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0) if ctx.needs_input_grad[0] else None


@once_differentiable
def first_only(ctx, g):
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def constant_factor(ctx, g):
    """dy/dx as a constant: the second derivative has no term of it."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w).detach()
    return d * w, (d * x).reshape(-1, 3).sum(0)


def reads_a_number(ctx, g):
    """`.item()` on the way: no batch of upstream gradients can pass."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w) * (1.0 if float(g.sum().item()) < 1e30 else 0.0)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def doubled_tangent(ctx, tx, tw):
    x, w = ctx.saved_tensors
    return slopes(x, w) * (tx * w + 2 * x * tw)


def forgets_absent_tangents(ctx, tx, tw):
    """Takes an argument without a tangent for a result without one."""
    x, w = ctx.saved_tensors
    return x * 0 if tx is None or tw is None else slopes(x, w) * (tx * w + x * tw)


def reads_a_tangent(ctx, tx, tw):
    x, w = ctx.saved_tensors
    return slopes(x, w) * (tx * w + x * tw) * (1.0 if float(tx.sum().item()) < 1e30 else 0.0)


def reads_memory_of_upstream(ctx, g):
    """A kernel that takes upstream gradients as contiguous: right for all but those of a sum or a transpose."""
    x, w = ctx.saved_tensors
    if not transformed() and not torch.is_grad_enabled() and not g.is_contiguous():
        memory = torch.as_strided(g, (g.untyped_storage().nbytes() // g.element_size(),), (1,), 0)
        g = memory.repeat(g.numel())[: g.numel()].view(g.shape)
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def writes_upstream(ctx, g):
    x, w = ctx.saved_tensors
    if not transformed() and not torch.is_grad_enabled() and g.is_contiguous():
        g.data.mul_(slopes(x, w))
        return g * w, (g * x).reshape(-1, 3).sum(0)
    d = g * slopes(x, w)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def right_once(ctx, g):
    """Works in the memory that forward left to it, and leaves it spoilt to a second pass."""
    x, w = ctx.saved_tensors
    d = g * (slopes(x, w) if transformed() or torch.is_grad_enabled() else ctx.saved)
    if not transformed() and not torch.is_grad_enabled():
        ctx.saved.mul_(0.5)
    return d * w, (d * x).reshape(-1, 3).sum(0)


def slopes_of_result(ctx, g):
    """From the result itself, which the caller may have written to since."""
    x, w = ctx.saved_tensors
    d = g * slopes(x, w)
    if not transformed() and not torch.is_grad_enabled():
        n = torch.arange(1.0, 4.0, dtype=x.dtype)
        d = g * (1 - (ctx.saved / n) ** 2) * n
    return d * w, (d * x).reshape(-1, 3).sum(0)


class Twice(torch.autograd.Function):
    """(right, 2 right); takes one absent upstream gradient for both."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return right(x, w), 2 * right(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, h):
        x, w = ctx.saved_tensors
        d = slopes(x, w) * (0.0 if g is None or h is None else g + 2 * h)
        return d * w, (d * x).reshape(-1, 3).sum(0)


def rows_of_contiguous_ids(ids, w):
    """tanh(w[ids]), reading ids in the order of a contiguous tensor."""
    if not transformed():
        ids = torch.as_strided(ids, ids.shape, (ids.shape[-1], 1)[-ids.ndim :])
    return torch.tanh(w[ids])


class Rows(torch.autograd.Function):
    """tanh(w[ids]), with a batching rule that takes the ids of the first sample for all."""

    @staticmethod
    def forward(ids, w):
        return torch.tanh(w[ids])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        ids, w = ctx.saved_tensors
        d = g * (1 - torch.tanh(w[ids]) ** 2)
        return None, torch.zeros_like(w).index_add(0, ids, d)

    @staticmethod
    def vmap(info, in_dims, ids, w):
        ids = ids if in_dims[0] is None else ids.select(in_dims[0], 0)
        w = w.expand(info.batch_size, *w.shape) if in_dims[1] is None else w.movedim(in_dims[1], 0)
        return torch.stack([Rows.apply(ids, sample) for sample in w]), 0


def wrong_for_one(info, in_dims, x, w):
    """A batching rule that drops an axis of size 1."""
    x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    w = w if in_dims[1] is None else w.movedim(in_dims[1], 0).unsqueeze(1)
    y = right(x, w)
    return (y[0] * 2, None) if info.batch_size == 1 else (y, 0)


def forgets_the_last_axis(info, in_dims, x, w):
    """A batching rule that takes every batch axis to be the first."""
    if in_dims[0] is not None and x.shape == (4, 3, info.batch_size):
        return right(x.movedim(-1, 0).flip(0), w), 0
    x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
    w = w if in_dims[1] is None else w.movedim(in_dims[1], 0).unsqueeze(1)
    return right(x, w), 0


STATE = {"calls": 0}


def counts(x, w):
    STATE["calls"] += 1
    return right(x, w) + STATE["calls"] * x


def writes(x, w):
    if not torch._C._are_functorch_transforms_active() and not x.requires_grad and not torch.compiler.is_compiling():
        x.add_(1.0).sub_(1.0)
    return right(x, w)


def draws(x, w):
    torch.rand(1)
    return right(x, w)


BUFFERS = {}
REMEMBERED = {}


def one_buffer(x, w):
    """Returns the same memory from each call."""
    y = right(x, w)
    if transformed() or y.requires_grad:
        return y
    return BUFFERS.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


def remembers(x, w):
    """Keeps what it made of w, by w's address; holds w, so that no other tensor is given the address."""
    if transformed() or x.requires_grad or w.requires_grad or torch.is_inference_mode_enabled():
        return right(x, w)
    return right(x, REMEMBERED.setdefault((w.data_ptr(), w.stride(), w.dtype), (w, w.clone()))[1])


def other_for_inference(x, w):
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()  # dynamo refuses the question
    return right(x, w) * (1.01 if inference else 1.0)


def other_without_gradients(x, w):
    return right(x, w) + (0.0 if x.requires_grad or w.requires_grad or transformed() else 0.01)


def dense_last_axis(x, w):
    """Copies what is not dense in the last axis, and takes the rest to be contiguous."""
    if transformed() or x.stride(-1) != 1 or x.stride(0) == 0:
        return right(x, w)
    return right(torch.as_strided(x, x.shape, (x.shape[-1], 1)), w)


def detached_under_func(x, w):
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return right(x, w.detach())
    return right(x, w)


def other_when_compiled(x, w):
    return right(x, w) * (1.01 if torch.compiler.is_compiling() else 1.0)


class Numbered:
    """A function with a number that changes at each call: to a compiler a constant, each time another."""

    def __init__(self):
        self.n = 0

    def __call__(self, x, w):
        self.n += 1
        return right(x, w) + 0.0 * self.n


def breaks_the_graph(x, w):
    print(end="")
    return right(x, w)


def once_contiguous(x, w):
    """Reads memory in the order of a contiguous tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return right(x, w)
    return right(torch.as_strided(x, (4, 3), (3, 1)), w)


def in_half(x, w):
    """Sums of squares held in the dtype of the input."""
    total = torch.zeros_like(x[..., :1])
    for i in range(x.shape[-1]):
        total = total + x[..., i : i + 1] ** 2
    return x * torch.rsqrt(total / x.shape[-1] + 1e-5) * w


def widened(x, w):
    return right(x, w).float() if x.dtype == torch.bfloat16 else right(x, w)
