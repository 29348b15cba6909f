"""Gradients that a user decides on: stop_gradient, custom_gradient, recompute_grad and kin."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tapegrad import _backend
from tapegrad._recording import only, state
from tapegrad._structure import flatten, is_container, map_structure, unflatten
from tapegrad._tape_arguments import is_floating
from tapegrad.errors import TapeWarning
from tapegrad.primitive import Primitive, primitive
from tapegrad.tape import GradientTape
from tapegrad.tensor import Operand, Tensor, as_array, wrap
from tapegrad.variable import Variable

_stop: Primitive = primitive("stop_gradient", lambda xp, x: x, None)


def stop_gradient(x: Any) -> Any:
    """Return the same values as constants: no gradient flows back through them.

    x  a tensor, or a structure of tensors; the answer has its structure.

    >>> x = tg.Variable(3.0)
    >>> with tg.GradientTape() as tape:
    ...     y = x * tg.stop_gradient(x)
    >>> float(tape.gradient(y, x))
    3.0
    """
    return map_structure(_stop, x)


class _Observer:
    """Listens in place of the tapes while a function runs: what it reads from outside itself."""

    lasting = False
    since = 0

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._inside = {x.id for x in own}
        self.variables: dict[int, tuple[Variable, Tensor]] = {}  # with the value first read
        self.tensors: dict[int, Tensor] = {}

    def record(
        self, primitive: Primitive, inputs: Any, outputs: Any, params: Any, node: Any
    ) -> Any:
        for x in inputs:
            if type(x) is Tensor and x.id not in self._inside:
                self.tensors[x.id] = x
        self._inside.update(y.id for y in outputs)
        return node

    def accessed(self, variable: Variable, version: Tensor) -> None:
        self.variables.setdefault(variable.id, (variable, version))
        self._inside.add(version.id)

    def writing(self, variable: Variable) -> None:
        if variable.id not in self.variables:
            with only([]):
                self.variables[variable.id] = (variable, variable._read())

    def watches(self, x: Operand) -> bool:
        return True  # somebody may: then what is only for tapes is worth doing


def _tapes() -> list[Any]:
    return [recorder for recorder in state.recorders if not recorder.lasting]


def _tensor(value: Any) -> Tensor:
    return value._read() if isinstance(value, Operand) else wrap(as_array(value))


def _watched(recorders: list[Any], x: Tensor) -> bool:
    return any(recorder.watches(x) for recorder in recorders)


def _own_outputs(result: Any, foreign: set[int]) -> tuple[Any, list[Tensor]]:
    """Return the result and its leaves as tensors that nothing but the function has made."""
    leaves = []
    for leaf in flatten(result):
        y = _tensor(leaf)
        leaves.append(_stop(y) if y.id in foreign else y)
    return unflatten(result, leaves), leaves


def _record(
    name: str,
    rule: Callable[..., Any],
    inputs: list[Tensor],
    outputs: list[Tensor],
    recorders: list[Any],
) -> None:
    """Enter one node, made for this call, on the tapes."""
    made = Primitive(name, _no_meaning, joint_vjp=rule)
    node = None
    for recorder in recorders:
        node = recorder.record(made, inputs, tuple(outputs), {}, node)


def _no_meaning(*_: Any) -> Any:
    raise AssertionError("a node of a custom gradient is recorded, never called")


def _upstream(g: Any, outputs: Sequence[tuple[Any, tuple[int, ...], Any]]) -> list[Tensor]:
    """Return an upstream gradient for each output: zeros where nothing arrived."""
    arrived = g if len(outputs) != 1 else (g,)
    return [
        wrap(xp.zeros(shape, dtype)) if part is None else part
        for part, (xp, shape, dtype) in zip(arrived, outputs, strict=True)
    ]


def _facts(outputs: list[Tensor]) -> list[tuple[Any, tuple[int, ...], Any]]:
    return [(_backend.module_of((y._array,)), y.shape, y.dtype) for y in outputs]


# ---- custom_gradient


def custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that returns `(result, grad)` so that `grad` is its gradient.

    grad  takes an upstream gradient for each tensor in the result (zeros for unused ones) and
          returns a gradient, or None, for each tensor among the arguments, given by position or
          by keyword, in the order of the signature; for a mapping of tensors, a mapping with its
          keys. Numbers count as tensors. If the function reads trainable Variables that are no
          arguments, `grad` must take a keyword `variables`, and returns a pair: the gradients of
          the arguments and a list of those of `variables`.

    Higher derivatives go through the operations of `grad`, what it captured of the function's own
    included. Raises `TypeError` when the function or `grad` has not the right form, `ValueError`
    for a wrong number or shape of gradients. A watched tensor that the function captures gets no
    gradient, with a `TapeWarning`.

    >>> @tg.custom_gradient
    ... def clipped_exp(x):
    ...     y = tg.exp(x)
    ...     return y, lambda upstream: upstream * tg.minimum(y, 100.0)
    >>> x = tg.Variable(10.0)
    >>> with tg.GradientTape() as tape:
    ...     y = clipped_exp(x)
    >>> float(tape.gradient(y, x))
    100.0
    """
    name = getattr(function, "__name__", "function")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _by_position(function, args, kwargs)
        slots = [i for i, leaf in enumerate(flatten(args)) if _is_tensor_argument(leaf)]
        leaves = flatten(args)
        for i in slots:
            leaves[i] = _tensor(leaves[i])
        args = unflatten(args, leaves)
        inputs = [leaves[i] for i in slots]
        form = map_structure(lambda _: None, args)
        recorders = _tapes()
        observer = _Observer(inputs)
        # Outer tapes see the function's own operations too, so that second derivatives reach what
        # `grad` captures of them. A single tape that can answer once never asks for those.
        seen_by = recorders if _second_order_is_possible(recorders) else []
        with only([*seen_by, observer]):
            answer = function(*args, **kwargs)
        result, grad = _result_and_grad(answer, name)
        if not recorders:
            return result
        variables = [
            (variable, version)
            for variable, version in observer.variables.values()
            if variable.trainable and _would_watch(recorders, variable, version)
        ]
        taken = {x.id for x in inputs}
        variables = [(v, version) for v, version in variables if version.id not in taken]
        if variables and not _takes_variables(grad):
            raise TypeError(
                f"@custom_gradient grad_fn must accept keyword argument 'variables', since "
                f"function uses variables: {[v.name for v, _ in variables]} (in {_place(function)})"
            )
        for x in observer.tensors.values():
            if _watched(recorders, x):
                warnings.warn(
                    f"{_place(function)} uses a watched tensor that is not among its arguments: "
                    "it gets no gradient from here; pass it as an argument",
                    TapeWarning,
                    stacklevel=2,
                )
        versions = [version for _, version in variables]
        foreign = taken | set(observer.tensors) | {version.id for version in versions}
        result, outputs = _own_outputs(result, foreign)
        facts = _facts(outputs)
        shapes = [x.shape for x in [*inputs, *versions]]

        def rule(needs: tuple[bool, ...], g: Any, _y: Any, *_inputs: Any) -> list[Tensor | None]:
            upstream = _upstream(g, facts)
            if variables:
                both = grad(*upstream, variables=[v for v, _ in variables])
                gradients = _both_kinds(both, form, len(inputs), len(variables), function)
            else:
                gradients = _gradients_of(grad(*upstream), form, len(inputs), function)
            return [
                _checked_gradient(gradient, shape, i, function)
                for i, (gradient, shape) in enumerate(zip(gradients, shapes, strict=True))
            ]

        _record(name, rule, [*inputs, *versions], outputs, recorders)
        return result

    return wrapper


def _second_order_is_possible(recorders: list[Any]) -> bool:
    return len(recorders) > 1 or any(getattr(r, "_persistent", True) for r in recorders)


def _is_tensor_argument(leaf: Any) -> bool:
    return (
        isinstance(leaf, Operand)
        or _backend.is_array(leaf)
        or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool))
    )


def _by_position(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move tensors that came by keyword to their places in the signature."""
    if not any(_is_tensor_argument(leaf) for leaf in flatten(kwargs)):
        return args, kwargs
    bound = inspect.signature(function).bind(*args, **kwargs)
    if any(isinstance(leaf, Operand) for leaf in flatten(bound.kwargs)):
        raise TypeError(
            f"{_place(function)}: a tensor cannot be a keyword-only argument of a "
            "custom_gradient function, since gradients are counted by position"
        )
    return bound.args, bound.kwargs


def _place(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    code = getattr(inspect.unwrap(function), "__code__", None)
    return name if code is None else f"{name} at {code.co_filename}:{code.co_firstlineno}"


def _result_and_grad(answer: Any, name: str) -> tuple[Any, Callable[..., Any]]:
    if not isinstance(answer, tuple) or len(answer) != 2 or not callable(answer[1]):
        raise TypeError(
            f"a custom_gradient function must return (result, grad_fn), but {name} returned "
            f"{'a tuple of ' + str(len(answer)) if isinstance(answer, tuple) else answer!r}"
        )
    return answer


def _takes_variables(grad: Callable[..., Any]) -> bool:
    parameters = inspect.signature(grad).parameters.values()
    return any(p.name == "variables" or p.kind is p.VAR_KEYWORD for p in parameters)


def _would_watch(recorders: list[Any], variable: Variable, version: Tensor) -> bool:
    for recorder in recorders:
        recorder.accessed(variable, version)
    return _watched(recorders, version)


def _in_order(answer: Any, form: Any) -> list[Any]:
    """Return the leaves of an answer; where the arguments are mappings, in the order of those."""
    pairs: Any
    if isinstance(form, Mapping) and isinstance(answer, Mapping) and form.keys() == answer.keys():
        pairs = [(answer[key], form[key]) for key in form]
    elif all(isinstance(x, (tuple, list)) for x in (answer, form)) and len(answer) == len(form):
        pairs = zip(answer, form, strict=True)
    else:
        return flatten(answer) if is_container(answer) else [answer]
    return [leaf for a, b in pairs for leaf in _in_order(a, b)]


def _gradients_of(
    answer: Any, form: tuple[Any, ...], count: int, function: Callable[..., Any]
) -> list[Any]:
    gradients = _in_order((answer,) if isinstance(answer, Mapping) else answer, form)
    if len(gradients) != count:
        error = ValueError(
            f"custom_gradient function expected to return {count} gradients, "
            f"but returned {len(gradients)} instead."
        )
        error.add_note(f"in the grad_fn of {_place(function)}")
        raise error
    return gradients


def _both_kinds(
    both: Any, form: tuple[Any, ...], inputs: int, variables: int, function: Callable[..., Any]
) -> list[Any]:
    if not isinstance(both, (tuple, list)) or len(both) != 2:
        raise TypeError(
            f"the grad_fn of {_place(function)} must return (gradients of the arguments, "
            "[gradients of the variables])"
        )
    of_variables = flatten(both[1]) if is_container(both[1]) else [both[1]]
    if len(of_variables) != variables:
        error = ValueError("Must return gradient for each variable from @custom_gradient grad_fn.")
        error.add_note(f"{variables} variables, {len(of_variables)} gradients: {_place(function)}")
        raise error
    return _gradients_of(both[0], form, inputs, function) + of_variables


def _checked_gradient(
    gradient: Any, shape: tuple[int, ...], position: int, function: Callable[..., Any]
) -> Tensor | None:
    if gradient is None:
        return None
    tensor = _tensor(gradient)
    if tensor.shape != shape:
        raise ValueError(
            f"the grad_fn of {_place(function)} returned a gradient of shape {tensor.shape} for "
            f"input {position}, which has shape {shape}"
        )
    return tensor


def grad_pass_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function's gradient be that of the identity: the straight-through estimator.

    The result must have the shape of the one argument. Variables inside get no gradient.

    >>> x = tg.Variable(3.3)
    >>> with tg.GradientTape() as tape:
    ...     y = tg.grad_pass_through(tg.round)(x) * 2.0
    >>> float(y), float(tape.gradient(y, x))
    (6.0, 2.0)
    """

    @custom_gradient
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        def grad(*upstream: Tensor, variables: Sequence[Variable] | None = None) -> Any:
            return (upstream, [None] * len(variables)) if variables else upstream

        return function(*args, **kwargs), grad

    return wrapper


# ---- recompute_grad


def recompute_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep nothing of a function's inside for the gradient: run it again when that is asked for.

    Memory for time, to any order of derivative. Gradients reach the arguments, and the Variables
    and watched tensors that the function captures; all of them have their old values while it
    runs again, random numbers too, and changes that it makes to Variables are made once only.

    >>> layer = tg.recompute_grad(lambda x: tg.tanh(x * x))
    >>> x = tg.Variable(0.5)
    >>> with tg.GradientTape() as tape:
    ...     y = layer(x)
    >>> tape.gradient(y, x) is not None
    True
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        recorders = _tapes()
        if not recorders:
            return function(*args, **kwargs)
        leaves = [
            leaf._read() if isinstance(leaf, Operand) else leaf for leaf in flatten((args, kwargs))
        ]
        arguments = [leaf for leaf in leaves if type(leaf) is Tensor]
        observer = _Observer(arguments)
        call_args, call_kwargs = unflatten((args, kwargs), leaves)
        with only([observer]):
            result = function(*call_args, **call_kwargs)
        before = list(observer.variables.values())
        variables = [(v, version) for v, version in before if is_floating(v.dtype)]
        for v, version in variables:
            for recorder in recorders:
                recorder.accessed(v, version)
        captured = [x for x in observer.tensors.values() if _watched(recorders, x)]
        inputs = [*arguments, *captured, *[version for _, version in variables]]
        result, outputs = _own_outputs(result, {x.id for x in inputs})
        facts = _facts(outputs)
        sources = [*arguments, *captured, *[v for v, _ in variables]]

        def rule(needs: tuple[bool, ...], g: Any, _y: Any, *_inputs: Any) -> list[Tensor | None]:
            wanted = [x for x, needed in zip(sources, needs, strict=True) if needed]
            with _old_values(before):
                with GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(wanted)
                    again = function(*call_args, **call_kwargs)
                found = iter(
                    tape.gradient(
                        [_tensor(y) for y in flatten(again)],
                        wanted,
                        output_gradients=_upstream(g, facts),
                    )
                )
            return [next(found) if needed else None for needed in needs]

        _record(getattr(function, "__name__", "function"), rule, inputs, outputs, recorders)
        return result

    return wrapper


@contextmanager
def _old_values(before: list[tuple[Variable, Tensor]]) -> Iterator[None]:
    """Give Variables the values of a first run, and afterwards those of now."""
    with only([]):
        now = [(variable, variable._read()) for variable, _ in before]
        for variable, version in before:
            _set(variable, version)
    try:
        yield
    finally:
        with only([]):
            for variable, version in now:
                _set(variable, version)


def _set(variable: Variable, version: Tensor) -> None:
    if variable._read().id != version.id:  # in training weights are as they were: nothing to copy
        variable.assign(version)
