"""The operations: a table of primitives for each family, and the functions that users call."""

from tapegrad.ops import methods, numpy_protocol  # which give Tensors their operators

__all__ = ["methods", "numpy_protocol"]
