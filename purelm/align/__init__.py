"""Alignment: what scores a model's answers."""

from purelm.align import graders

__all__ = ["graders"]
