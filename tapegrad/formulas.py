"""Formulas: several elementwise operations as one primitive, and on a GPU as one launch.

A formula is written once, as a function of a namespace of operations and its inputs. On arrays it
is the primitive's meaning; on Tensors it has derivatives of every order; and written down, step by
step, it is the kernel of a GPU and what stands for the primitive in a compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tapegrad._backend import Array, Module
from tapegrad.kernels import chains
from tapegrad.kernels._build import cpp_type
from tapegrad.linear import add
from tapegrad.primitive import MultiPrimitive, Primitive, multi_primitive, primitive, primitives
from tapegrad.tensor import Tensor

Write = Callable[..., Any]


class Ref(NamedTuple):
    """A value of a formula: the inputs and then the steps' results are numbered from 0."""

    number: int


class Step(NamedTuple):
    """An operation, by its primitive's name, on values and Python numbers."""

    name: str
    operands: tuple[Ref | float, ...]


class _Operations:
    """Operations by name, each made of its primitive when it is first asked for."""

    def __init__(self, made: Callable[[Primitive], Callable[..., Any]]) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in primitives:
            raise AttributeError(f"there is no primitive {name!r}")
        function = self._made(primitives[name])
        setattr(self, name, function)
        return function


@functools.cache
def _on_arrays(xp: Module) -> _Operations:
    return _Operations(lambda made: functools.partial(made.forward, xp))


_on_tensors = _Operations(lambda made: made)


class Formula:
    """Elementwise operations on `inputs` values of one shape and floating type.

    write  `write(o, *inputs, **params)` returns the result, or a tuple of them; o.exp(x) and so on
           are the operations of that name, whose operands may be Python numbers, as params are.
    """

    def __init__(self, inputs: int, write: Write) -> None:
        self.inputs = inputs
        self.write = write
        self._written: dict[tuple[Any, ...], tuple[tuple[Step, ...], tuple[int, ...]]] = {}
        self._chains: dict[tuple[Any, ...], chains.Chain | None] = {}

    def steps(self, params: dict[str, Any]) -> tuple[tuple[Step, ...], tuple[int, ...]]:
        """Return the operations one by one, and which values are the results."""
        key = _key(params)
        written = self._written.get(key)
        if written is None:
            steps: list[Step] = []

            def noting(operation: Primitive) -> Callable[..., Ref]:
                def note(*operands: Ref | float) -> Ref:
                    steps.append(Step(operation.name, operands))
                    return Ref(self.inputs + len(steps) - 1)

                return note

            result = self.write(_Operations(noting), *map(Ref, range(self.inputs)), **params)
            results = (result,) if isinstance(result, Ref) else result
            if len(self._written) >= _MOST_PARAMS:
                self._written.clear()
            written = self._written[key] = tuple(steps), tuple([x.number for x in results])
        return written

    def of_tensors(self, *tensors: Tensor, **params: Any) -> Any:
        """Return what `write` does of Tensors; params may be Tensors too."""
        return self.write(_on_tensors, *tensors, **params)

    def kernel(self, xp: Module, *arrays: Array, **params: Any) -> Any:
        """Return what `write` does of arrays, in one launch; None for what no kernel can do."""
        if not all(isinstance(array, xp.ndarray) for array in arrays):
            return None
        shape = arrays[0].shape
        type_name = cpp_type(*arrays)
        if type_name is None or any(array.shape != shape for array in arrays):
            return None
        key = type_name, *_key(params)
        chain = self._chains.get(key)
        if chain is None:
            if len(self._chains) >= _MOST_PARAMS:
                self._chains.clear()
            chain = self._chains[key] = self._chain(type_name, params)
        found = None if chain is None else chains.run(chain, shape, xp, *arrays)
        return found if found is None or len(found) > 1 else found[0]

    def _chain(self, type_name: str, params: dict[str, Any]) -> chains.Chain | None:
        steps, results = self.steps(params)
        numbers = [x for step in steps for x in step.operands if not isinstance(x, Ref)]
        if not all(map(chains.is_literal, numbers)):
            return None
        written = [
            chains.Step(
                step.name,
                tuple([x.number if isinstance(x, Ref) else float(x) for x in step.operands]),
            )
            for step in steps
        ]
        inputs = (chains.Input("each", False),) * self.inputs
        return chains.Chain(type_name, inputs, tuple(written), results, ())

    def pulled_back(
        self, wrt: int, G: Tensor, *inputs: Tensor, result: int = 0, **params: Any
    ) -> Tensor | None:
        """Return the gradient of one input from that of a result, by the operations' rules.

        The rules are operations on Tensors, and so are the values: a tape follows both.
        """
        steps, results = self.steps(params)
        values: list[Any] = list(inputs)
        reached = {wrt}
        for k, step in enumerate(steps, self.inputs):
            values.append(primitives[step.name](*_given(step, values)))
            if any(isinstance(x, Ref) and x.number in reached for x in step.operands):
                reached.add(k)
        upstream = {results[result]: G}
        for k in range(results[result], self.inputs - 1, -1):
            g, step = upstream.pop(k, None), steps[k - self.inputs]
            if g is None:
                continue
            given = _given(step, values)
            for x, rule in zip(step.operands, primitives[step.name].vjps, strict=True):
                if rule is not None and isinstance(x, Ref) and x.number in reached:
                    part = rule(g, values[k], *given)
                    before = upstream.get(x.number)
                    upstream[x.number] = part if before is None else add(before, part)
        return upstream.get(wrt)


def _key(params: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([(k, type(v), v) for k, v in params.items()])


def _given(step: Step, values: Sequence[Any]) -> list[Any]:
    return [values[x.number] if isinstance(x, Ref) else x for x in step.operands]


_MOST_PARAMS = 256  # that a formula is kept written for: they may be new in every call
formulas: dict[str, Formula] = {}  # by the name of the primitive that each is


def _enter(name: str, write: Write) -> tuple[Formula, Callable[..., Any]]:
    """Note a formula, and return it with its meaning."""
    inputs = write.__code__.co_argcount - 1
    made = formulas[name] = Formula(inputs, write)
    forward: Callable[..., Any] = lambda xp, *x, **params: write(_on_arrays(xp), *x, **params)
    if not write.__code__.co_kwonlyargcount:  # the primitive's call is as short as it can be
        if inputs == 1:
            forward = lambda xp, x: write(_on_arrays(xp), x)
        elif inputs == 2:
            forward = lambda xp, x1, x2: write(_on_arrays(xp), x1, x2)
    return made, forward


def formula(name: str, write: Write, *vjps: Any) -> Primitive:
    """Make a formula a primitive, with a rule for each input, and enter it in the table."""
    made, forward = _enter(name, write)
    return primitive(name, forward, *vjps, kernel=made.kernel)


def gradient_formula(name: str, write: Write, *, curved: bool = True) -> Primitive:
    """Make a primitive of an elementwise function's gradient, `write(o, g, *read, **params)`.

    It is linear in the upstream gradient g. `curved` says whether it depends on what else it reads
    other than by steps.
    """
    made, forward = _enter(name, write)

    def of_g(G: Tensor, _y: Any, _g: Any, *read: Tensor, **params: Any) -> Tensor:
        return gradient(G, *read, **params)

    def of_read(wrt: int) -> Callable[..., Tensor | None]:
        def rule(G: Tensor, _y: Any, g: Tensor, *read: Tensor, **params: Any) -> Tensor | None:
            return made.pulled_back(wrt, G, g, *read, **params)

        return rule

    rules = [of_read(wrt) if curved else None for wrt in range(1, made.inputs)]
    gradient = primitive(name, forward, of_g, *rules, kernel=made.kernel)
    return gradient


def formula_with_share(name: str, write: Write, gradient: Primitive) -> MultiPrimitive:
    """Make a primitive of a formula of x with a second result, which its gradient reads again.

    gradient  `gradient(g, x, share, **params)`, for the first result.
    """
    made, forward = _enter(name, write)

    def vjp(
        needs: tuple[bool, ...],
        g: tuple[Tensor | None, Tensor | None],
        y: tuple[Tensor, Tensor],
        x: Tensor,
        **params: Any,
    ) -> tuple[Tensor | None]:
        of_y, of_share = g
        total = None if of_y is None else gradient(of_y, x, y[1], **params)
        if of_share is not None:
            part = made.pulled_back(0, of_share, x, result=1, **params)
            total = part if total is None or part is None else add(total, part)
        return (total,)

    return multi_primitive(name, forward, joint_vjp=vjp, kernel=made.kernel)


def one_launch(name: str, inputs: int = 1) -> Callable[..., Any]:
    """Return a kernel for a primitive of one operation, whose meaning may take several launches."""
    return Formula(inputs, lambda o, *x: getattr(o, name)(*x)).kernel
