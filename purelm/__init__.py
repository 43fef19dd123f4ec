"""purelm: language models from scratch, as pure functions on PyTorch.

    import purelm
    key = purelm.random.key(0)

A room is imported when its name is first used, so that `import purelm` itself imports nothing, not even torch.

    tree, random     trees of tensors; random numbers from explicit keys
    transforms       gradients, compilation with donation, rematerialisation, accumulation
    ops, models      the maths of a language model; the Transformer
    optim, train     optimizers, schedules, averages; the training step
    tokenizer, data  byte-level BPE; token files, batches, corpora
    curate           web data: steps from crawls to documents that are worth training on
    generate, evals  text from a model; perplexity and bits per byte
    align            post-training: prompts and responses, masked means, LoRA, graders
    scaling          laws of loss over parameters and tokens, fitted to runs, and what is best for a budget
    accounting       parameters, FLOPs, bytes and messages
    checkpoint       saved trees, whole or by parts
    track            metrics, curves and reports of a run
    interop          torch.optim and nn.Module over these functions
    testing          laws to run on functions of your own; strategies for hypothesis
    kernels, dist    Triton kernels; several processes: import their modules by name, as purelm.dist.zero
    devices, files   what a device computes natively; files written beside their name
    workers, caches  a function over many items by threads or processes; what functions keep, and clear_caches()
"""

TYPE_CHECKING = False  # of typing, which would be the only import here
if TYPE_CHECKING:
    from types import ModuleType

    from purelm import (
        accounting,
        align,
        caches,
        checkpoint,
        curate,
        data,
        devices,
        dist,
        evals,
        files,
        generate,
        interop,
        kernels,
        models,
        ops,
        optim,
        random,
        scaling,
        testing,
        tokenizer,
        track,
        train,
        transforms,
        tree,
        workers,
    )

__version__ = "0.1.0"

__all__ = [
    "accounting",
    "align",
    "caches",
    "checkpoint",
    "curate",
    "data",
    "devices",
    "dist",
    "evals",
    "files",
    "generate",
    "interop",
    "kernels",
    "models",
    "ops",
    "optim",
    "random",
    "scaling",
    "testing",
    "tokenizer",
    "track",
    "train",
    "transforms",
    "tree",
    "workers",
]


def __getattr__(name: str) -> "ModuleType":
    """A room, imported at its first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'purelm' has no attribute {name!r}; its rooms are {', '.join(__all__)}")
    import importlib

    return importlib.import_module(f"purelm.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
