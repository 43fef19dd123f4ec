"""Functions that torch.compile leaves as they are, while it compiles the functions that they call."""

import functools
from collections.abc import Callable
from typing import Any

import torch

# Private names of torch 2.11-2.13, all of which torch._dynamo.skip and torch._dynamo.disable use in the same way.
# Importing those would take as long as importing torch itself, also for users who never compile.
_eval_frame: Any = torch._C._dynamo.eval_frame
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)


def between_graphs(body: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
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

    if like is not None:
        # Not like's attributes: those of a compiled function would have dynamo look through the wrapper.
        functools.update_wrapper(wrapper, like, assigned=("__module__", "__qualname__", "__doc__"), updated=())
    not_traced(wrapper)
    return wrapper


def not_traced(function: Any) -> Any:
    """Mark a function: dynamo neither traces into it nor compiles its own frame."""
    function._torchdynamo_disable = True
    function._torchdynamo_disable_msg = "purelm.transforms works between compiled graphs"
    _eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    return function
