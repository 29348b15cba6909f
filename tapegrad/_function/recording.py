"""Recording: writes down every primitive of one call of a function, while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._function.program import Program, Step, Value
from tapegrad._function.shorthands import written_out
from tapegrad._recording import user_location
from tapegrad._storage import lies_in_buffer
from tapegrad._structure import flatten, map_structure
from tapegrad.errors import FunctionError
from tapegrad.primitive import Primitive, Update, primitives
from tapegrad.tensor import Operand, Tensor, next_id, wrap
from tapegrad.variable import Variable

# What depends on the shape of its input alone: a constant.
_CONSTANTS = frozenset(("ones_like", "zeros_like"))


class Recording:
    """Hears everything that happens on this thread while a function runs.

    A tensor that depends on nothing but constants is a constant, and what computed it no step:
    its recorded value is what it always is. Of everything else only shape and dtype are kept.

    strict   whether what cannot be replayed raises `FunctionError`; else it is kept as `problem`.
    founding whether Variables may be made: only in the function's first call.
    """

    lasting = True

    def __init__(self, name: str, inputs: Sequence[Tensor], strict: bool, founding: bool) -> None:
        self._name = name
        self._strict = strict
        self._founding = founding
        self.since = next_id()  # versions of Variables that are older were read outside
        self.problem: str | None = None
        self.created_variables = False
        self.on_device = False  # whether an array of CuPy took part: programs are NumPy's calls
        self._inputs = [
            Value("input", x.shape, x.dtype, position) for position, x in enumerate(inputs)
        ]
        self._values = {x.id: value for x, value in zip(inputs, self._inputs, strict=True)}
        self._constants: dict[int, Value] = {}
        # How constants came about, by the tensors' ids; patterns may be made of them too.
        self._makers: dict[int, tuple[Primitive, Sequence[Any], dict[str, Any]]] = {}
        self._ids: dict[Value, int] = {}
        self._steps: list[Step] = []

    # ---- what it is told

    def record(
        self,
        primitive: Primitive,
        inputs: Sequence[Any],
        outputs: tuple[Tensor, ...],
        params: dict[str, Any],
        node: Any,
    ) -> Any:
        """Write down one call, unless its result is a constant."""
        self._look_at(outputs)
        values = self._values
        if primitive.name in _CONSTANTS:
            return node
        for x in inputs:
            if type(x) is Tensor and x.id in values:
                break
        else:
            if len(outputs) == 1:
                self._makers[outputs[0].id] = primitive, inputs, params
            return node
        results = [Value("result", y._array.shape, y._array.dtype) for y in outputs]
        self._steps.append(
            Step(
                primitive,
                list(map(self._value, inputs)),
                results,
                params,
                user_location(),
                order=len(self._steps),
            )
        )
        for y, result in zip(outputs, results, strict=True):
            values[y.id] = result
        return node

    def _look_at(self, operands: Sequence[Operand]) -> None:
        kind = _backend.cupy_ndarray
        if kind is not None and not self.on_device:
            self.on_device = any(isinstance(x._array, kind) for x in operands)

    def _value(self, x: Any) -> Any:
        if type(x) is not Tensor:
            return x
        found = self._values.get(x.id) or self._constants.get(x.id)
        if found is None:
            kept = wrap(x._array.copy()) if lies_in_buffer(x._array) else x
            found = self._constants[x.id] = Value("constant", x.shape, x.dtype, kept)
            self._ids[found] = x.id
        return found

    def _maker_of(self, constant: Value) -> Step | None:
        """Return the step that gave a constant, if an operation did."""
        found = self._makers.get(self._ids.get(constant, 0))  # 0 is no id
        if found is None:
            return None
        primitive, inputs, params = found
        return Step(primitive, list(map(self._value, inputs)), (constant,), params, "")

    def accessed(self, variable: Variable, version: Tensor) -> None:
        """Take a Variable's version for a value of its own."""
        if version.id not in self._values:
            self._values[version.id] = Value(
                "read", version.shape, version._array.dtype, variable, len(self._steps)
            )

    def writing(self, variable: Variable) -> None:
        """Wait for `updated`."""

    def updated(self, update: Update, inputs: Sequence[Any], params: dict[str, Any]) -> None:
        """Write down an update that has happened."""
        count = update.writes
        self._look_at(inputs[:count])
        read = [self._value(x._read() if isinstance(x, Operand) else x) for x in inputs[count:]]
        self._steps.append(
            Step(update, read, (), params, user_location(), inputs[:count], len(self._steps))
        )

    def copied(self, x: Tensor, copy: Tensor) -> None:
        """A constant made of a value that depends on the inputs depends on them too."""
        self.record(primitives["cast"], (x,), (copy,), {"dtype": copy.dtype}, None)

    def leaving(self, x: Operand, how: str) -> None:
        """Refuse to let a value that depends on the inputs become one that is always the same."""
        if isinstance(x, Variable) or x.id in self._values:
            self.refuse(
                f"{how} needs the value of a tensor while {self._name} is being compiled, at "
                f"{user_location()}; each call has another, and a compiled call would use this "
                "one for ever: compute with tensors (tg.where for a choice), return the tensor and "
                "look at it outside, or leave the function uncompiled"
            )

    def created(self, variable: Variable) -> None:
        """Allow Variables in the first call only: a replay makes none."""
        self.created_variables = True
        if not self._founding:
            self.refuse(
                f"{self._name} makes a Variable in every call, at {user_location()} (optimisers, "
                "layers and random numbers with a seed of their own make some): make it once, "
                "outside or in the first call only, and assign to it"
            )

    def watches(self, x: Operand) -> bool:
        """Say no: what is only for tapes need not be done for a recording."""
        return False

    def refuse(self, problem: str) -> None:
        """Raise an error, or keep the function from being compiled."""
        if self._strict:
            raise FunctionError(problem)
        self.problem = self.problem or problem

    # ---- what it wrote

    def program(self, result: Any) -> Program:
        """Return what was recorded of a call that gave `result`."""
        leaves = [
            self._value(leaf._read()) if isinstance(leaf, Tensor) else leaf
            for leaf in flatten(result)
        ]
        structure = map_structure(_without_values, result)
        xp = _backend.module_named("cupy" if self.on_device else "numpy")
        steps = written_out(xp, self._steps)
        program = Program(self._inputs, steps, leaves, structure, not self.on_device)
        program.maker_of = self._maker_of
        return program


def _without_values(leaf: Any) -> Any:
    """Return what stands for a tensor of the result: the program must not keep its values."""
    if not isinstance(leaf, Tensor):
        return leaf
    return wrap(np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape))
