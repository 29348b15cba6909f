"""Tensor, the immutable value, and Operand, what a Tensor and a Variable have in common."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._recording import state, tell_copied, tell_leaving
from tapegrad._storage import lies_in_buffer, register_view

# What operations accept beside CuPy's arrays: everything that can become a Tensor.
ArrayLike: TypeAlias = "Operand | np.ndarray[Any, Any] | np.generic | float | Sequence[Any]"

# Identity: ids are counted, never reused, and never compared by value or by address.
next_id = itertools.count(1).__next__

DEFAULT_FLOAT = np.dtype(np.float32)  # of Python floats; arrays keep their own type

_new = object.__new__


class Operand:
    """What a Tensor and a Variable share: shape, conversions, operators and methods.

    Operators and methods are the functions of `tapegrad.ops`, attached by `tapegrad.ops.methods`.
    """

    __slots__ = ()

    _array: Array
    id: int

    def _read(self) -> Tensor:
        """Return the value as a plain Tensor; tapes see the reading of a Variable."""
        raise NotImplementedError

    # ---- facts

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self._array.shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the elements, a NumPy dtype."""
        return self._array.dtype  # type: ignore[no-any-return]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._array.ndim  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self._array.size)

    @property
    def nbytes(self) -> int:
        """The bytes that the elements take."""
        return int(self._array.nbytes)

    @property
    def backend(self) -> str:
        """Where the values lie: `"numpy"` or `"cupy"`."""
        return _backend.name_of(_backend.module_of((self._array,)))

    @property
    def device(self) -> Any:
        """Where the values lie, in the array API standard's sense: `"cpu"` or a CuPy device."""
        return "cpu" if self.backend == "numpy" else self._array.device

    # ---- the way out

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the values as a NumPy array of the caller's own.

        The values leave tapegrad: no gradient flows through what is computed from them.

        >>> import tapegrad as tg
        >>> tg.constant([1.0, 2.0]).numpy()
        array([1., 2.], dtype=float32)
        """
        self._leave(".numpy()")
        return _backend.to_numpy(self._array)

    def _leave(self, how: str) -> None:
        if state.recorders:
            tell_leaving(self, how)

    @property
    def array(self) -> Array:
        """The raw array, uncopied: read-only with NumPy, and not to be written with CuPy.

        A Variable's raw array, and that of a Tensor read from it, shows the next value too.
        """
        self._leave(".array")
        array = self._array
        if isinstance(array, (np.ndarray, np.generic)):
            array = np.asarray(array).view()
            array.flags.writeable = False
        return array

    def item(self) -> Any:
        """Return the only element as a Python number; raises `ValueError` if there are more."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element, got shape {self.shape}")
        self._leave(".item()")
        return _backend.waited(self._array.item())

    def tolist(self) -> Any:
        """Return the values as nested lists of Python numbers."""
        self._leave(".tolist()")
        return _backend.waited(self._array.tolist())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return the values for `np.asarray(x)`: read-only and uncopied where that is safe."""
        self._leave("np.asarray(x)")
        array = self._array
        if self.backend == "cupy":
            raise TypeError(
                "the tensor lies on the GPU and is not copied to the host silently: "
                "write x.numpy() to copy it"
            )
        shared = isinstance(array, np.ndarray) and lies_in_buffer(array)
        if copy is False and shared:
            raise ValueError("a Variable's values cannot be handed out uncopied: use copy=None")
        if copy or shared or dtype not in (None, array.dtype):
            if copy is False:
                raise ValueError(f"dtype {array.dtype} cannot become {dtype} without a copy")
            return np.array(array, dtype=dtype)
        return self.array  # type: ignore[no-any-return]

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the module `tapegrad`, whose names are the array API standard's."""
        import tapegrad

        return tapegrad

    def __dlpack__(self, **options: Any) -> Any:
        """Export a copy of the values; raises what the array module raises for bad options."""
        if options.get("copy") is False:
            raise BufferError("tapegrad exports copies only: a consumer could write to the values")
        self._leave("DLPack")
        options.pop("copy", None)
        array = self._array
        array = np.array(array) if self.backend == "numpy" else array.copy()
        return array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the device as DLPack numbers it."""
        array = self._array
        array = np.asarray(array) if isinstance(array, np.generic) else array
        return array.__dlpack_device__()

    # ---- Python's conversions

    def _scalar(self, kind: str) -> Any:
        if self.size != 1:
            raise TypeError(
                f"only a tensor of one element can become {kind}, this one has shape {self.shape}"
            )
        self._leave(kind)
        return _backend.waited(self._array.item())

    def __float__(self) -> float:
        return float(self._scalar("a Python float"))

    def __int__(self) -> int:
        return int(self._scalar("a Python int"))

    def __index__(self) -> int:
        return operator.index(self._scalar("an index"))

    def __bool__(self) -> bool:
        if self.size > 1:
            raise ValueError(
                "the truth value of a tensor of more than one element is ambiguous: "
                "use tg.any(x) or tg.all(x)"
            )
        self._leave("a Python bool (an `if`, a `while`, `and`)")
        return _backend.waited(bool(self._array))

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a 0-d tensor has no len()")
        return int(self._array.shape[0])

    def __format__(self, spec: str) -> str:
        if not spec:
            self._leave("text in an f-string")
            return str(self)
        return format(self._scalar(f"text by the format {spec!r}"), spec)

    def __contains__(self, value: Any) -> bool:
        self._leave("`in`")
        return _backend.waited(bool((self._array == value).any()))

    # ---- identity: hashing is by object, so that `gradients[variable]` works

    __hash__ = object.__hash__

    def __copy__(self) -> Operand:
        return self

    if TYPE_CHECKING:  # attached by tapegrad.ops.methods

        def __getattr__(self, name: str) -> Any: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def __iter__(self) -> Any: ...
        def __neg__(self) -> Tensor: ...
        def __pos__(self) -> Tensor: ...
        def __abs__(self) -> Tensor: ...
        def __invert__(self) -> Tensor: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __floordiv__(self, other: Any) -> Tensor: ...
        def __rfloordiv__(self, other: Any) -> Tensor: ...
        def __mod__(self, other: Any) -> Tensor: ...
        def __rmod__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __and__(self, other: Any) -> Tensor: ...
        def __or__(self, other: Any) -> Tensor: ...
        def __xor__(self, other: Any) -> Tensor: ...
        def __eq__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def __ne__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def __lt__(self, other: Any) -> Tensor: ...
        def __le__(self, other: Any) -> Tensor: ...
        def __gt__(self, other: Any) -> Tensor: ...
        def __ge__(self, other: Any) -> Tensor: ...


class Tensor(Operand):
    """An immutable array value with an identity of its own, which tapes know it by.

    Made by `tapegrad.constant` and by every operation. `Tensor(value, dtype)` is the same as
    `constant(value, dtype)`.
    """

    __slots__ = ("__weakref__", "_array", "id")

    def __init__(self, value: Any, dtype: Any = None) -> None:
        array = as_array(value, dtype)
        # as_array hands out an operand's own array, and a Variable's memory changes
        self._array = array.copy() if isinstance(value, Operand) else array
        self.id = next_id()
        if state.recorders and isinstance(value, Operand):
            tell_copied(value._read(), self)

    def _read(self) -> Tensor:
        return self

    def __str__(self) -> str:
        text = str(_backend.to_numpy(self._array))
        lead = "\n" if "\n" in text else ""
        return f"tg.Tensor({lead}{text}, shape={self.shape}, dtype={self.dtype})"

    def __repr__(self) -> str:
        return f"<tg.Tensor: shape={self.shape}, dtype={self.dtype}, numpy={describe(self)}>"

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError(
            "a Tensor is a value and cannot be changed: make a new one with tg.where(...), "
            "or keep what changes in a tg.Variable and assign to it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = wrap(self._array)  # the values never change, so they may be shared
        if state.recorders:
            tell_copied(self, copy)
        return copy

    def __reduce__(self) -> Any:
        return _unpickle, (self.numpy(), self.backend)


def _unpickle(values: np.ndarray[Any, Any], backend: str) -> Tensor:
    """Make a pickled Tensor again, on its backend if that is at hand, else where new arrays go."""
    xp = np if backend == "numpy" else _backend.default_module()
    return wrap(_backend.to_module(values, xp))


def wrap(array: Array) -> Tensor:
    """Make a Tensor of an array that nobody else will write to."""
    tensor = _new(Tensor)
    tensor._array = array
    tensor.id = next_id()
    if array.base is not None:
        register_view(tensor)
    return tensor


def describe(value: Operand) -> str:
    """Return the values as `repr` shows them: a bare number for a 0-d tensor."""
    values = value.numpy()
    return str(values) if values.ndim == 0 else repr(values)


# ---- conversion of what users pass


def as_array(value: Any, dtype: Any = None, xp: Module | None = None) -> Array:
    """Copy a number, nested list, array or operand into an array of tapegrad's own.

    Python floats become float32, Python ints int64, arrays keep their type. CuPy's arrays stay on
    the GPU; everything else goes to `xp`, or to where new arrays are made.
    """
    if isinstance(value, Operand):
        array = value._read()._array
        return array if dtype is None or array.dtype == dtype else array.astype(dtype)
    if _backend.is_array(value):
        _check_dtype(value.dtype, value)
        if not isinstance(value, np.ndarray):
            return value.astype(dtype or value.dtype, copy=True)
        values = np.array(value, dtype, subok=False)
    else:
        values = _as_numpy(value, dtype)
    xp = _backend.default_module() if xp is None else xp
    if xp is np:
        return _scalar(values)
    try:
        return xp.asarray(values)
    except MemoryError as error:
        raise _backend.out_of_memory(error, "constant") from None


def _scalar(array: np.ndarray[Any, Any]) -> Any:
    """Make a NumPy scalar of a 0-d array: arithmetic with it costs half as much."""
    return array[()] if array.ndim == 0 else array


def is_convertible(value: Any) -> bool:
    """Tell whether a value is of a kind that can become a tensor, whatever it holds."""
    return isinstance(value, (Operand, float, int, complex, np.generic, list, tuple)) or (
        hasattr(value, "__array__") or _backend.is_array(value)
    )


def _as_numpy(value: Any, dtype: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, (list, tuple)) and _holds_operand(value):
        raise TypeError(
            "a list that holds tensors would lose their gradients: write tg.stack([...])"
        )
    try:
        values = np.array(value)
    except ValueError as error:
        raise ValueError(f"the nested list is ragged or holds unlike things: {error}") from None
    _check_dtype(values.dtype, value)
    if dtype is not None:
        # Not astype for integers: of 300 it makes the int8 44 without a word.
        integers = np.dtype(dtype).kind in "iu"
        return np.array(value, dtype) if integers else values.astype(dtype)
    if values.dtype == np.float64 and _is_python_number_tree(value):
        return values.astype(DEFAULT_FLOAT)
    return values


def _check_dtype(dtype: np.dtype[Any], value: Any) -> None:
    if dtype.kind in "biuf" or dtype.name == "bfloat16":
        return
    if dtype.kind == "c":
        raise TypeError(
            f"complex numbers are not supported, got {dtype}: "
            "carry real and imaginary parts as two tensors"
        )
    kind = type(value).__name__
    raise TypeError(f"a tensor holds numbers, got {kind} of dtype {dtype}")


def _holds_operand(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_operand(child) for child in value)
    return isinstance(value, Operand)


def _is_python_number_tree(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_python_number_tree(child) for child in value)
    return type(value) in (float, int, bool)


def constant(value: Any, dtype: Any = None, shape: Any = None) -> Tensor:
    """Return a Tensor with a copy of `value`: a number, nested list, array, Tensor or Variable.

    Python floats become float32 and Python ints int64 unless `dtype` says otherwise; arrays keep
    their type and their backend. `shape`, if given, reshapes, and spreads a single number.
    A copy of a Tensor or a Variable is a new constant: no gradient flows through it.

    Raises `TypeError` for what is not numeric, `ValueError` for ragged lists and wrong shapes.

    >>> import tapegrad as tg
    >>> print(tg.constant([1.0, 2.0]))
    tg.Tensor([1. 2.], shape=(2,), dtype=float32)
    """
    tensor = Tensor(value, dtype)
    if shape is None:
        return tensor
    if isinstance(value, Operand):
        value._leave("tg.constant(tensor, shape=...)")
    array = tensor._array
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if array.size == 1 and array.shape != shape:
        spread = _backend.module_of((array,)).empty(shape, array.dtype)
        spread[...] = array
        return wrap(spread)
    if array.size != math.prod(shape):
        raise ValueError(f"{array.size} values cannot fill the shape {shape}")
    return wrap(array.reshape(shape))


def from_dlpack(value: Any, /, *, device: Any = None, copy: bool | None = None) -> Tensor:
    """Return a Tensor with a copy of an array of another library, handed over by DLPack.

    Raises `ValueError` for `copy=False`: a Tensor is a value, and shared memory could change.

    >>> import numpy as np, tapegrad as tg
    >>> print(tg.from_dlpack(np.arange(3.0)))
    tg.Tensor([0. 1. 2.], shape=(3,), dtype=float64)
    """
    if copy is False:
        raise ValueError("from_dlpack copies always: shared memory could change under a tensor")
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise TypeError(
            f"from_dlpack needs an array of another library, got a {type(value).__name__}: "
            "numbers and lists go to tg.constant"
        )
    kind, _ = value.__dlpack_device__()
    on_host = kind in (1, 3)  # kDLCPU, kDLCUDAHost
    xp = np if on_host else _backend.module_named("cupy")
    array = xp.from_dlpack(value)
    _check_dtype(array.dtype, value)
    return wrap(xp.array(array))
