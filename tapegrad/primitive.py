"""Primitive: what an operation computes and what its derivative is; the one place of every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array
from tapegrad._recording import state
from tapegrad._storage import register_view
from tapegrad.tensor import Operand, Tensor, as_array, is_convertible, next_id, wrap

Rule = Callable[..., Any]
_P = TypeVar("_P", bound="Primitive")

_new = object.__new__
_NUMBERS = frozenset((float, int))
_NO_PARAMS: dict[str, Any] = {}


class NotConvertible(TypeError):
    """An argument is of a kind that no operation takes."""


# All primitives by name: for tests that must not miss one.
primitives: dict[str, Primitive] = {}


class Primitive:
    """An operation: its meaning on arrays, its derivative in terms of other primitives.

    name      what it is called in messages.
    forward   the meaning: `forward(xp, *arrays, **params)` returns an array, or a tuple of them,
              with the calls of the array module `xp`, NumPy or CuPy. Arrays come by position,
              all else by keyword; an argument given as a Python number stays one.
    vjps      one rule for each input, `rule(g, y, *inputs, **params)`: the gradient with respect
              to that input from the upstream gradient g, the output y and the inputs, all Tensors,
              written in operations, so that an outer tape records it. None: no gradient flows.
              For several outputs, g and y are tuples, and g holds None where nothing arrived.
    joint_vjp one rule for all inputs, for gradients that share work: `rule(needs, g, y, *inputs,
              **params)` returns a tuple; needs[i] says whether input i's is wanted.
    kernel    a faster way to the same values: called as `forward` is, on a GPU, and answers None
              for arrays that it was not written for.
    fills     whether the kernel takes `out`, for each output an array to write it to, or None.

    Rules never mention broadcasting or promotion: the tape sums a gradient to its source's shape
    and casts it to its dtype. A parameter of a rule whose name begins with an underscore is not
    read: the tape then keeps its shape and dtype, and forgets the values.
    """

    __slots__ = ("_reads", "differentiable", "fills", "forward", "joint_vjp", "kernel", "name",
                 "saved", "vjps")  # fmt: skip

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        *vjps: Rule | None,
        joint_vjp: Rule | None = None,
        kernel: Callable[..., Any] | None = None,
        fills: bool = False,
    ) -> None:
        self.name = name
        self.forward = forward
        self.vjps = vjps
        self.joint_vjp = joint_vjp
        self.kernel = kernel
        self.fills = fills
        # With None for every input the results are constants. Without any rule they are not: then
        # somebody forgot one, and the reverse pass says so.
        self.differentiable = joint_vjp is not None or not vjps or any(vjps)
        # What saved_for has answered.
        self.saved: dict[tuple[int, int], tuple[tuple[int, ...], bool]] = {}
        if joint_vjp is not None:
            self._reads: list[_Reads | None] = [_Reads(joint_vjp, skip=2)]
        else:
            self._check_arity(forward, vjps)
            self._reads = [None if rule is None else _Reads(rule, skip=1) for rule in vjps]

    def _check_arity(self, forward: Callable[..., Any], vjps: Sequence[Rule | None]) -> None:
        code = getattr(forward, "__code__", None)
        if not vjps or code is None or code.co_flags & 0x04:  # *args takes any number
            return
        inputs = code.co_argcount - 1
        if len(vjps) != inputs:
            raise TypeError(
                f"primitive {self.name!r}: its meaning takes {inputs} arrays, "
                f"but {len(vjps)} rules are given; write None where no gradient flows"
            )

    def __repr__(self) -> str:
        return f"<Primitive {self.name}>"

    def __call__(self, *inputs: Any, **params: Any) -> Tensor:
        """Compute the output, and let every active recorder note the call."""
        arrays: list[Any] = []
        tensors = 0
        for x in inputs:
            kind = type(x)
            if kind is Tensor:
                arrays.append(x._array)
                tensors += 1
            elif kind is float or kind is int:
                arrays.append(x)
            else:
                tensors = 0
                break
        values: Sequence[Any] = inputs
        if not tensors:
            values, arrays = self._convert(inputs)
        if not _backend.numpy_alone:
            return self._finish(self.compute(arrays, params), values, params)
        # What compute does, without its call and its questions: 0.4 us of 2.
        try:
            y = self.forward(np, *arrays, **params)
        except (ValueError, TypeError, IndexError) as error:
            raise self._explained(error, arrays) from error
        except MemoryError as error:
            raise _backend.out_of_memory(error, self.name) from None
        return self._finish(y, values, params)

    def compute(
        self,
        arrays: Sequence[Any],
        params: dict[str, Any],
        out: Sequence[Array | None] | None = None,
    ) -> Any:
        """Return what a call gives for these arrays, by the kernel or the meaning; no recording.

        out  for each output an array that it may be written to, or None; only a kernel that
             `fills` arrays does so, and the results say where they lie.
        """
        xp = self._module_of(arrays)
        try:
            y = None
            if self.kernel is not None and _backend.runs_kernels(xp):
                if out is not None and self.fills:
                    y = self.kernel(xp, *arrays, out=out, **params)
                else:
                    y = self.kernel(xp, *arrays, **params)
            return self.forward(xp, *arrays, **params) if y is None else y
        except (ValueError, TypeError, IndexError) as error:
            raise self._explained(error, arrays) from error
        except MemoryError as error:
            raise _backend.out_of_memory(error, self.name) from None

    def _finish(self, y: Any, inputs: Sequence[Any], params: dict[str, Any]) -> Tensor:
        out = _new(Tensor)
        out._array = y
        out.id = next_id()
        if y.base is not None:
            register_view(out)
        recorders = state.recorders
        if recorders:
            node = None
            for recorder in recorders:
                node = recorder.record(self, inputs, (out,), params, node)
        return out

    def _convert(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Turn what users pass into Tensors and Python numbers; return them and their arrays."""
        values = list(inputs)
        pending: list[int] = []
        numbers = 0
        for i, x in enumerate(values):
            kind = type(x)
            if kind is float or kind is int:
                numbers += 1
            elif isinstance(x, Operand):
                values[i] = x._read()
            elif _backend.is_array(x):
                values[i] = Tensor(x)
            else:
                pending.append(i)  # a list or a NumPy scalar has a type, but goes where others are
                if not is_convertible(x):
                    raise NotConvertible(
                        f"[{self.name}] argument {i} must be a tensor, an array, a number or a "
                        f"list of numbers, got {x!r}"
                    )
        if numbers == len(values):  # an operation needs a tensor: the floats, else the integers
            floats = [i for i, x in enumerate(values) if type(x) is float]
            pending = floats or list(range(numbers))
        if pending:
            like = [x._array for x in values if type(x) is Tensor]
            xp = self._module_of(like) if like else _backend.default_module()
            for i in pending:
                values[i] = self._converted(values[i], i, xp)
        return values, [x._array if type(x) is Tensor else x for x in values]

    def _converted(self, value: Any, position: int, xp: Any) -> Tensor:
        tensor = _new(Tensor)
        try:
            tensor._array = as_array(value, xp=xp)
        except (TypeError, ValueError) as error:
            raise type(error)(f"[{self.name}] argument {position}: {error}") from None
        tensor.id = next_id()
        return tensor

    def _module_of(self, arrays: Sequence[Any]) -> Any:
        if not arrays:
            return _backend.default_module()
        try:
            return _backend.module_of(arrays)
        except TypeError as error:
            raise TypeError(f"[{self.name}] {error}") from None

    def _explained(self, error: Exception, arrays: Sequence[Any]) -> Exception:
        """Return the array module's complaint with the operation's name and what it was given."""
        text = str(error)
        if text.startswith("["):
            return error
        got = ", ".join(
            f"{a.dtype}{list(a.shape)}" if hasattr(a, "shape") else repr(a) for a in arrays
        )
        kind: type[Exception] = TypeError
        for known in (np.exceptions.AxisError, IndexError, ValueError):
            if isinstance(error, known):
                kind = known
                break
        return kind(f"[{self.name}] {text} (got {got})")

    def saved_for(self, mask: int, count: int) -> tuple[tuple[int, ...], bool]:
        """Return which of `count` inputs no rule reads, and whether one reads the output.

        Bit i of `mask` says that input i's gradient may be asked for.
        """
        if self.joint_vjp is not None:
            active = [self._reads[0]]
        else:
            active = [reads for i, reads in enumerate(self._reads) if mask >> i & 1]
        used = [reads for reads in active if reads is not None]
        answer = self.saved[mask, count] = (
            tuple(i for i in range(count) if not any(reads.input(i) for reads in used)),
            any(reads.output for reads in used),
        )
        return answer


class Unary(Primitive):
    """A primitive of one input without parameters: its call is as short as Python allows.

    Elementwise operations are called often and on small tensors: going through argument lists
    would double the cost of a call (0.4 us to 0.8 us over NumPy's own 0.2 us).
    """

    __slots__ = ()

    def __call__(self, x: Any, /) -> Tensor:
        """Compute the output, and let every active recorder note the call."""
        if type(x) is not Tensor:
            if not isinstance(x, Operand):
                return Primitive.__call__(self, x)
            x = x._read()
        if not _backend.numpy_alone:
            return Primitive.__call__(self, x)
        array = x._array
        try:
            y = self.forward(np, array)
        except (ValueError, TypeError, IndexError) as error:
            raise self._explained(error, (array,)) from error
        out = _new(Tensor)
        out._array = y
        out.id = next_id()
        if y.base is not None:
            register_view(out)
        recorders = state.recorders
        if recorders:
            node = None
            for recorder in recorders:
                node = recorder.record(self, (x,), (out,), _NO_PARAMS, node)
        return out


class Binary(Primitive):
    """A primitive of two inputs without parameters; see `Unary`."""

    __slots__ = ()

    def __call__(self, x1: Any, x2: Any, /) -> Tensor:
        """Compute the output, and let every active recorder note the call."""
        if type(x1) is Tensor:
            array1 = x1._array
        elif isinstance(x1, Operand):
            x1 = x1._read()
            array1 = x1._array
        elif isinstance(x2, Operand) and type(x1) in _NUMBERS:
            array1 = x1
        else:
            return Primitive.__call__(self, x1, x2)
        if type(x2) is Tensor:
            array2 = x2._array
        elif type(x2) in _NUMBERS:
            array2 = x2
        elif isinstance(x2, Operand):
            x2 = x2._read()
            array2 = x2._array
        else:
            return Primitive.__call__(self, x1, x2)
        if not _backend.numpy_alone:
            return Primitive.__call__(self, x1, x2)
        try:
            y = self.forward(np, array1, array2)
        except (ValueError, TypeError, IndexError) as error:
            raise self._explained(error, (array1, array2)) from error
        out = _new(Tensor)
        out._array = y
        out.id = next_id()
        if y.base is not None:
            register_view(out)
        recorders = state.recorders
        if recorders:
            node = None
            for recorder in recorders:
                node = recorder.record(self, (x1, x2), (out,), _NO_PARAMS, node)
        return out


class MultiPrimitive(Primitive):
    """A primitive with several outputs: its meaning returns a tuple, and so does the call."""

    __slots__ = ()

    if TYPE_CHECKING:

        def __call__(self, *inputs: Any, **params: Any) -> tuple[Tensor, ...]: ...  # type: ignore[override]

    def _finish(  # type: ignore[override]
        self, y: Any, inputs: Sequence[Any], params: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        outputs = tuple(map(wrap, y))
        node = None
        for recorder in state.recorders:
            node = recorder.record(self, inputs, outputs, params, node)
        return outputs


class _Reads:
    """Which of its arguments a rule reads, by the names that it gives them."""

    __slots__ = ("inputs", "others", "output")

    def __init__(self, rule: Rule, skip: int) -> None:
        code = getattr(rule, "__code__", None)
        if code is None:  # a callable object: it may read anything
            self.output = self.others = True
            self.inputs: tuple[bool, ...] = ()
            return
        names = code.co_varnames[: code.co_argcount]
        starred = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
        self.output = not names[skip].startswith("_") if len(names) > skip else True
        self.inputs = tuple([not name.startswith("_") for name in names[skip + 1 :]])
        self.others = bool(code.co_flags & 0x04) and not starred[0].startswith("_")

    def input(self, position: int) -> bool:
        """Tell whether the rule reads the input at `position`."""
        return self.inputs[position] if position < len(self.inputs) else self.others


def primitive(
    name: str, forward: Callable[..., Any], *vjps: Rule | None, **options: Any
) -> Primitive:
    """Make a primitive of one output, and enter it in the table of all primitives."""
    code = getattr(forward, "__code__", None)
    kind: type[Primitive] = Primitive
    if code is not None and not code.co_flags & 0x0C and not code.co_kwonlyargcount:
        kind = {2: Unary, 3: Binary}.get(code.co_argcount, Primitive)
    return _enter(kind(name, forward, *vjps, **options))


def multi_primitive(
    name: str, forward: Callable[..., Any], *vjps: Rule | None, **options: Any
) -> MultiPrimitive:
    """Make a MultiPrimitive and enter it in the table of all primitives."""
    return _enter(MultiPrimitive(name, forward, *vjps, **options))


def _enter(made: _P) -> _P:
    if made.name in primitives:
        raise ValueError(f"there is a primitive {made.name!r} already")
    primitives[made.name] = made
    return made


class Update:
    """A primitive that writes: its first inputs are Variables whose memory it changes.

    `forward(xp, *arrays, **params)` writes the first `writes` arrays in place; `kernel` does the
    same faster and answers None where it declines. State is not differentiated.
    """

    __slots__ = ("forward", "kernel", "name", "writes")

    def __init__(
        self,
        name: str,
        forward: Callable[..., None],
        *,
        writes: int,
        kernel: Callable[..., Any] | None = None,
    ) -> None:
        self.name = name
        self.forward = forward
        self.writes = writes
        self.kernel = kernel

    def __call__(self, *inputs: Any, **params: Any) -> None:
        """Write; whoever still reads the old values keeps them."""
        recorders = state.recorders
        if recorders:
            for x in inputs[self.writes :]:
                if isinstance(x, Operand):
                    x._read()  # which they may want to know of
        for variable in inputs[: self.writes]:
            for recorder in recorders:
                recorder.writing(variable)
            buffer = variable._buffer
            if buffer.shown:
                buffer.before_write(variable._array)
        # Fetched only now: a value that was a view of what is written has just been moved.
        self.compute([x if isinstance(x, (float, int)) else x._array for x in inputs], params)
        for recorder in recorders:
            if recorder.lasting:
                recorder.updated(self, inputs, params)

    def compute(self, arrays: Sequence[Any], params: dict[str, Any]) -> None:
        """Write to the first of these arrays, by the kernel or the meaning; no recording."""
        try:
            xp = np if _backend.numpy_alone else _backend.module_of(arrays)
            done = None
            if self.kernel is not None and _backend.runs_kernels(xp):
                done = self.kernel(xp, *arrays, **params)
            if done is None:
                self.forward(xp, *arrays, **params)
        except (ValueError, TypeError) as error:
            raise type(error)(f"[{self.name}] {error}") from error
        except MemoryError as error:
            raise _backend.out_of_memory(error, self.name) from None
