"""A kernel with whatever behaviour a test needs."""

from hotpath.conftest import kernel

__all__ = ["kernel"]
