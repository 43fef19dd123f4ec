"""Functions that torch.compile leaves as they are, while it compiles the functions that they call."""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Private names of torch 2.11-2.13, all of which torch._dynamo.skip and torch._dynamo.disable use in the same way.
# Importing those would take as long as importing torch itself, also for users who never compile.
_eval_frame: Any = torch._C._dynamo.eval_frame
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)

_number = itertools.count()


def not_traced(function: F) -> F:
    """Mark a function: dynamo neither traces into it nor compiles its own frame."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "purelm.transforms works between compiled graphs"  # type: ignore[attr-defined]
    _eval_frame.set_code_exec_strategy(function.__code__, _SKIP)  # type: ignore[attr-defined]
    return function


@not_traced
def between_graphs(body: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """The function (*args, **kwargs) -> body(call, *args, **kwargs), documented as `like`.

    In a function that is being compiled, it ends a graph. body then runs as plain Python, helpers and all, except
    for what it calls as call(f, *args, **kwargs): f is compiled as it would be outside.
    """

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        compiler = _eval_frame.set_eval_frame(None)

        def call(f: Callable[..., Any], *f_args: Any, **f_kwargs: Any) -> Any:
            _eval_frame.set_eval_frame(compiler)
            try:
                return f(*f_args, **f_kwargs)
            finally:
                _eval_frame.set_eval_frame(None)

        try:
            return body(call, *args, **kwargs)
        finally:
            _eval_frame.set_eval_frame(compiler)

    # Not like's attributes: those of a compiled function would have dynamo look through the wrapper.
    functools.update_wrapper(wrapper, like, assigned=("__module__", "__qualname__", "__doc__"), updated=())
    return not_traced(wrapper)


@not_traced
def own_cache(f: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """f in a function with a code object of its own.

    torch.compile keeps its compiled versions, their limit of 8 and what it learnt about dynamic shapes by code object
    (the last even by file, line and name). Functions that are made by another, as every loss of a train step is,
    share theirs: without this the ninth model of a process would run uncompiled.

    Inside a compiled function f is returned as it is: there it is made anew in every call, and has to share.
    """
    if _eval_frame.get_eval_frame_callback() is not None:
        return f
    label = name or getattr(f, "__name__", type(f).__name__)
    f = own_code(f)

    def called(*args: Any, **kwargs: Any) -> Any:
        return f(*args, **kwargs)

    code_name = "".join(c if c.isalnum() else "_" for c in f"{label}_{next(_number)}")
    code = called.__code__.replace(co_name=code_name)
    return types.FunctionType(code, called.__globals__, code_name, None, called.__closure__)


def own_code(f: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Python's with a code object of its own; anything else as it is.

    Before torch 2.13 a graph that ends inside of f makes f a frame of its own, whose compiled versions go by f's code.
    They do not look at default arguments: of two lambdas of one line, the second one's ran as the first one's.
    """
    if not isinstance(f, types.FunctionType) or getattr(f, "_torchdynamo_disable", False):
        return f
    copy = types.FunctionType(
        f.__code__.replace(co_name=f"{f.__code__.co_name}_{next(_number)}"),
        f.__globals__, f.__name__, f.__defaults__, f.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = f.__kwdefaults__
    copy.__dict__.update(f.__dict__)
    return copy


not_traced(not_traced)
