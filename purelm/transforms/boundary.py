"""Functions that torch.compile leaves as plain Python, while it compiles the functions that they call."""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

# Private names, used as torch._dynamo.skip and torch._dynamo.disable use them in torch 2.11 to 2.13. Importing
# torch._dynamo would take as long as importing torch itself, also for users who never compile.
_eval_frame: Any = torch._C._dynamo.eval_frame
_SKIP = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)

_number = itertools.count()


def not_traced(function: F) -> F:
    """The same function, marked so that dynamo neither traces into it nor compiles its own frame."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = "purelm.transforms works between compiled graphs"  # type: ignore[attr-defined]
    _eval_frame.set_code_exec_strategy(function.__code__, _SKIP)  # type: ignore[attr-defined]
    return function


@not_traced
def between_graphs(body: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
    """The function (*args, **kwargs) -> body(call, *args, **kwargs), with the name and docstring of `like`.

    When a function that is being compiled calls it, the graph breaks. body and its helpers then run as plain Python;
    only a function f that body calls as call(f, *args, **kwargs) is compiled.
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

    # like.__dict__ is not copied: the attributes of a compiled function would make dynamo trace through the wrapper.
    functools.update_wrapper(wrapper, like, assigned=("__module__", "__qualname__", "__doc__"), updated=())
    return not_traced(wrapper)


@not_traced
def own_cache(f: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
    """f wrapped in a function with a code object that no other function has.

    Per code object, torch.compile keeps compiled versions, limits their number to 8, and records dynamic shapes (the
    last by file, line and name). Closures made by one factory, as the losses of all train steps are, share a code
    object, so that without this the ninth model of a process would run uncompiled.

    Inside a compiled function f is returned unchanged: a new code object in every call would never find its compiled
    version.
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
    """A copy of a Python function f with a code object of its own; anything else unchanged.

    Before torch 2.13, a graph break inside f makes dynamo compile f as a frame of its own and look up the result by f's
    code object, without comparing default arguments: a second lambda made on the same line, with other defaults, ran
    the code compiled for the first.
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
