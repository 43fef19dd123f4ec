"""purelm: language models from scratch, as pure functions on PyTorch."""

__version__ = "0.1.0"
