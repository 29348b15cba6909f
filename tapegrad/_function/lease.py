"""Lease: results that lie in a program's own memory, until the program runs again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from tapegrad._backend import Array, owner_of
from tapegrad._storage import Buffer
from tapegrad.tensor import Tensor, next_id

_new = object.__new__


class Lease:
    """Makes results of memory that the next call overwrites, and takes them back before it.

    Taken back are the Tensors that were handed out and all views that operations made of them:
    whoever reads one then gets an error, not the values of another call.
    """

    def __init__(self, memory: Array, name: str) -> None:
        self._buffer = Buffer(memory)  # which hears of views
        self._owner = owner_of(memory)
        self._expired = _Expired(name)
        self._given: list[Tensor] = []

    def __call__(self, array: Array) -> Tensor:
        """Return a result."""
        out = _new(Tensor)
        out._array = array
        out.id = next_id()
        self._given.append(out)
        return out

    def end(self, arrays: Sequence[Array]) -> list[Array]:
        """Take the results back; return a call's inputs, copied where they are among them."""
        owner = self._owner
        kept = [a.copy() if a.base is not None and owner_of(a) is owner else a for a in arrays]
        expired = self._expired
        for tensor in self._given:
            tensor._array = expired
        self._given.clear()
        if self._buffer.shown:
            self._buffer.revoke(expired)
        return kept


class _Expired:
    """Stands where a Tensor's array was, and raises an error whatever is asked of it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            f"this tensor is a result that {self._name} had leased, and {self._name} has been "
            "called again since: copy what is to last with y.numpy() or +y before the next call, "
            "or leave out lease_results"
        )

    __getattr__ = _refuse


# Python looks operators up in the class, past __getattr__; each object has comparisons already.
_OBJECTS_OWN = frozenset(("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"))
for _name in dir(np.ndarray):
    if _name in _OBJECTS_OWN or (
        _name.startswith("__")
        and callable(getattr(np.ndarray, _name))
        and _name not in dir(_Expired)
    ):
        setattr(_Expired, _name, _Expired._refuse)
