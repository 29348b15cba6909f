"""Variable: state that changes by assignment only, in memory that it may share with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from tapegrad import _backend, _storage
from tapegrad._backend import Array, Module
from tapegrad._index import filled
from tapegrad._recording import lasting, state
from tapegrad._storage import Buffer, register_view
from tapegrad.primitive import Update
from tapegrad.tensor import Operand, Tensor, as_array, describe, next_id, wrap

_new = object.__new__


def _assign(xp: Module, target: Array, value: Any, *arrays: Array, index: Any = ...) -> None:
    _backend.write_at(xp, target, index if index is ... else filled(index, arrays), value)


def _assign_add(xp: Module, target: Array, value: Any, *arrays: Array, index: Any = ...) -> None:
    if index is ...:
        target += value
    else:
        target += _spread(xp, target, value, filled(index, arrays))


def _assign_sub(xp: Module, target: Array, value: Any, *arrays: Array, index: Any = ...) -> None:
    if index is ...:
        target -= value
    else:
        target -= _spread(xp, target, value, filled(index, arrays))


def _spread(xp: Module, target: Array, value: Any, index: Any) -> Array:
    """Return zeros of the target's shape with `value` added at `index`, repeated indices summed."""
    places = xp.arange(target.size).reshape(target.shape)[index]
    values = xp.broadcast_to(xp.asarray(value, target.dtype), places.shape).reshape(-1)
    total = _backend.scatter_add(xp, values, places.reshape(-1), target.size)
    return total.reshape(target.shape)


assign = Update("assign", _assign, writes=1)
assign_add = Update("assign_add", _assign_add, writes=1)
assign_sub = Update("assign_sub", _assign_sub, writes=1)


class Variable(Operand):
    """State that a program trains: a value that changes by `assign` and its kin, and only by them.

    value      a number, nested list, array, Tensor or Variable; always copied. A Python float
               makes float32, a Python int int64 (which has no gradient: write 3.0).
    trainable  whether tapes watch it when it is read (fixed for life).
    dtype      of the values; None keeps the type that `value` has.
    name       used in messages, summaries and weight files.

    Whatever was computed from an earlier value keeps that value, on a tape or in a Tensor.

    >>> import tapegrad as tg
    >>> v = tg.Variable([1.0, 2.0], name="v")
    >>> v.assign_add([1.0, 1.0])
    <tg.Variable 'v:0' shape=(2,) dtype=float32, numpy=array([2., 3.], dtype=float32)>
    """

    __slots__ = ("__weakref__", "_array", "_buffer", "_tensor", "_trainable", "id", "name")

    def __init__(
        self,
        value: Any,
        trainable: bool = True,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(trainable, (bool, np.bool_)):
            raise TypeError(f"trainable must be True or False, got {trainable!r}")
        array = as_array(value, dtype)
        if isinstance(array, np.generic) or isinstance(value, Operand):
            array = _backend.module_of((array,)).array(array)
        self._place(Buffer(array), array.view())
        self._trainable = bool(trainable)
        self.id = next_id()
        self.name = "Variable" if name is None else name
        for recorder in lasting():
            recorder.created(self)

    def _place(self, buffer: Buffer, array: Array) -> None:
        """Let the values lie in `array`, a view of the buffer's memory that holds them already."""
        self._buffer = buffer
        self._array = array
        _storage.placements += 1
        self._tensor: Tensor | None = None
        buffer.add_member(self)

    def _tear(self, why: str) -> None:
        """Let every further use say that the values are neither the old nor the new ones."""
        if type(self._array) is not _Torn:
            self._array = _Torn(self.name, why, self._array)
            self._tensor = None
            _storage.placements += 1

    def _move(self, xp: Module) -> None:
        """Let the values lie in memory of the array module `xp`, if they do not yet."""
        if _backend.module_of((self._array,)) is not xp:
            array = _backend.to_module(self._array, xp)
            self._place(Buffer(array), array.view())

    def _read(self) -> Tensor:
        """Return this version's value: one Tensor for as long as nothing is assigned."""
        version = self._tensor
        recorders = state.recorders
        if version is None or (recorders and version.id < recorders[0].since):
            version = self._tensor = self._version()
        for recorder in recorders:
            recorder.accessed(self, version)
        return version

    def _version(self) -> Tensor:
        version = _new(Tensor)
        version.id = next_id()
        array = self._array
        if array.ndim == 0 and type(array) is np.ndarray:
            version._array = array[()]  # a NumPy scalar: a value of its own, and ten times faster
            self._buffer.shown = True
        else:
            version._array = array
            self._buffer.register(version)
        return version

    @property
    def _memory(self) -> Array:
        """Where the values lie, whole or torn: who is about to assign them asks what fits there."""
        array = self._array
        return array.memory if type(array) is _Torn else array

    @property
    def trainable(self) -> bool:
        """Whether tapes watch this variable when it is read; fixed at construction."""
        return self._trainable

    # ---- changing it

    def assign(self, value: Any) -> Variable:
        """Set the value, of the same shape, and return the variable.

        Raises `ValueError` for another shape (a number is not spread), `TypeError` for a dtype
        that does not fit (a float for an integer variable).
        """
        return self._update(assign, value)

    def assign_add(self, delta: Any) -> Variable:
        """Add `delta`, of the same shape, and return the variable; raises as `assign` does."""
        return self._update(assign_add, delta)

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract `delta`, of the same shape, and return the variable; raises as `assign`."""
        return self._update(assign_sub, delta)

    def _update(
        self, update: Update, value: Any, index: Any = None, arrays: Sequence[Tensor] = ()
    ) -> Variable:
        torn = self._array
        if type(torn) is _Torn and update is assign and index is None:
            self._array = torn.memory
            _storage.placements += 1
            try:
                return self._update(update, value)
            except BaseException:
                self._array = torn
                raise
        if isinstance(value, Operand):
            value = value._read()
        elif not isinstance(value, (float, int)) or isinstance(value, (bool, np.generic)):
            value = wrap(as_array(value, xp=_backend.module_of((self._array,))))
        shape = getattr(value, "shape", ())
        if index is None and shape != self.shape:
            raise ValueError(
                f"[{update.name}] variable {self.name!r} has shape {self.shape}, "
                f"the value has shape {shape}: they must be equal"
            )
        dtype = getattr(value, "dtype", type(value))
        if not np.can_cast(dtype, self.dtype, "same_kind"):
            raise TypeError(
                f"[{update.name}] variable {self.name!r} holds {self.dtype}, "
                f"the value is {np.dtype(dtype)}: cast it first with tg.astype"
            )
        if index is None:
            update(self, value)
        else:
            update(self, value, *arrays, index=index)
        return self

    def _refuse_in_place(self, other: Any) -> NoReturn:
        raise RuntimeError(
            "variable += value would replace the variable by a tensor (and so would -=, *=, ...): "
            "write variable.assign_add(value) to change it, or out = variable + value"
        )

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = _refuse_in_place
    __imod__ = __ipow__ = __imatmul__ = __iand__ = __ior__ = __ixor__ = _refuse_in_place

    # ---- Python's protocols

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        return (
            f"<tg.Variable '{self.name}:0' shape={self.shape} dtype={self.dtype}, "
            f"numpy={describe(self)}>"
        )

    def __copy__(self) -> Variable:
        return Variable(self, trainable=self._trainable, name=self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable:
        return self.__copy__()

    def __reduce__(self) -> Any:
        return _unpickle, (self.numpy(), self.backend, self._trainable, self.name)


class _Torn:
    """Stands in place of an array that was half written."""

    def __init__(self, name: str, why: str, memory: Array) -> None:
        self.memory = memory
        self._text = (
            f"variable {name!r} holds neither its old nor its new values: {why}; assign it a "
            "value, or load its weights again"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(self._text)


def over_memory(buffer: Buffer, array: Array) -> Variable:
    """Make a Variable of memory that lies in a buffer: writing to it changes what lies there."""
    variable = _new(Variable)
    variable._trainable = False
    variable.id = next_id()
    variable.name = "memory"
    variable._place(buffer, array)
    return variable


def _unpickle(values: Any, backend: str, trainable: bool, name: str) -> Variable:
    with _backend.backend("numpy" if backend == "numpy" else "auto"):
        xp = _backend.default_module()
    return Variable(_backend.to_module(values, xp), trainable=trainable, name=name)


class VariableSlice(Tensor):
    """What `variable[index]` gives: a Tensor that can also assign to that part of the variable."""

    __slots__ = ("_arrays", "_index", "_plain", "_variable")

    def __init__(
        self, variable: Variable, index: Any, arrays: Sequence[Tensor], plain: Tensor
    ) -> None:
        self._array = plain._array
        self.id = plain.id
        self._plain = plain
        self._variable = variable
        self._index = index
        self._arrays = arrays
        if self._array.base is not None:
            register_view(self)

    def _read(self) -> Tensor:
        return self._plain

    def assign(self, value: Any) -> Variable:
        """Set this part of the variable (numbers are spread) and return the variable."""
        return self._variable._update(assign, value, self._index, self._arrays)

    def assign_add(self, delta: Any) -> Variable:
        """Add to this part of the variable and return the variable."""
        return self._variable._update(assign_add, delta, self._index, self._arrays)

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract from this part of the variable and return the variable."""
        return self._variable._update(assign_sub, delta, self._index, self._arrays)
