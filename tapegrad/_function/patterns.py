"""Patterns: two functions that compute the same, the one found in programs, the other put there.

Both are recorded once, as `tg.function` records, on small arrays; so the steps to look for and the
steps that replace them are those of the tape itself, its rules' included: what the reverse pass of
the one leaves in a program becomes the reverse pass of the other.

Found is what is made by the same primitives of the same values: the rows and columns of the
arrays on which a pattern was recorded stand for any others. A step that is replaced stays where
something else needs it, so a pattern is right whatever surrounds it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tapegrad._function.program import Program, Step, Value, makers_of, replaced, users_of
from tapegrad._function.recording import Recording
from tapegrad._function.rewrites import Rewrite, without_dead_steps, without_repeated_steps
from tapegrad._recording import alone
from tapegrad._tape_arguments import is_floating
from tapegrad.tape import GradientTape
from tapegrad.tensor import Tensor, wrap

# The lengths of the arrays that patterns are recorded on: primes, so that products of two tell
# which two, and none that is an axis or a number of its own.
_LENGTHS = {"n": 11, "c": 13, "i": 17, "o": 19}
_COMMUTATIVE = frozenset(("add", "multiply"))


class Pattern:
    """Two functions of the same tensors that give the same results.

    inputs  the letters of each tensor's axes, "1" for one of length 1; in capitals if it holds
            integers.
    wrt     whether the gradient of the first input is looked for too: the functions then have one
            result. Else they may have several, of which the first is made of all the others.
    types   the letters of the floating types that it is right for; None for all.
    """

    def __init__(
        self,
        before: Callable[..., Any],
        after: Callable[..., Any],
        *inputs: str,
        wrt: bool = False,
        types: str | None = None,
    ) -> None:
        self._functions = before, after
        self._types = types
        self._arrays = [_example(letters) for letters in inputs]
        self.wrt = wrt

    # Recorded when they are needed: a program without logarithms needs few.

    @functools.cached_property
    def before(self) -> _Template:
        """What to look for."""
        return _Template(self._functions[0], self._arrays, self._types)

    @functools.cached_property
    def after(self) -> _Template:
        """What replaces it."""
        return _Template(self._functions[1], self._arrays, self._types)

    @functools.cached_property
    def both_ways(self) -> tuple[_Template, _Template]:
        """Both, with the gradient as second result, from a last input: the result's gradient."""
        arrays = [*self._arrays, np.ones(self.before.outputs[0].shape, np.float32)]
        before, after = (_Template(_with_gradient(f), arrays, self._types) for f in self._functions)
        return before, after


def _example(letters: str) -> Any:
    kind = np.int64 if letters.isupper() else np.float32
    return np.ones([_LENGTHS.get(letter, 1) for letter in letters.lower()], kind)


def _with_gradient(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        *xs, g = inputs
        with GradientTape() as tape:
            tape.watch(xs[0])
            y = function(*xs)
        return y, tape.gradient(y, xs[0], output_gradients=g)

    return call


class _Template(Program):
    """A function's steps on arrays of its pattern's lengths, in float32."""

    def __init__(
        self, function: Callable[..., Any], arrays: Sequence[Any], types: str | None
    ) -> None:
        self._types = types
        inputs = [wrap(array) for array in arrays]
        recording = Recording("a pattern", inputs, strict=True, founding=False)
        with alone(recording), np.errstate(all="ignore"):
            result = function(*inputs)
        program = recording.program(result)
        super().__init__(program.inputs, program.steps, program.outputs, None)
        without_repeated_steps(self)
        without_dead_steps(self)
        self.made_by = makers_of(self.steps)

    def takes(self, dtype: np.dtype[Any]) -> bool:
        """Tell whether a floating type may stand where float32 stood."""
        return is_floating(dtype) and (self._types is None or dtype.char in self._types)


class _Found:
    """Where a template lies in a program: as far as it has been compared."""

    def __init__(
        self,
        template: _Template,
        made_by: dict[Value, Step],
        maker_of: Callable[[Value], Step | None],
    ) -> None:
        self._template = template
        self._made_by = made_by
        self._maker_of = maker_of
        self.values: dict[Value, Value] = {}
        self.steps: dict[Step, Step] = {}
        self.lengths: dict[int, int] = {}
        self.dtype: Any = None  # which stands where the template has float32

    def copy(self) -> _Found:
        """Return one to go on with, while this one stays as it is."""
        other = _Found(self._template, self._made_by, self._maker_of)
        other._take(self)
        return other

    def _take(self, other: _Found) -> None:
        self.values, self.steps = dict(other.values), dict(other.steps)
        self.lengths, self.dtype = dict(other.lengths), other.dtype

    # ---- comparing

    def value(self, t: Any, p: Any) -> bool:
        """Tell whether a template's value may stand for a program's, and take note if so."""
        if type(t) is not Value or type(p) is not Value:
            return type(t) is type(p) and repr(t) == repr(p)
        known = self.values.get(t)
        if known is not None:
            return known is p
        if not self._shape(t, p) or not self._type(t, p):
            return False
        if t.kind == "constant":
            return p.kind == "constant" and _counts(t) and _counts(p)
        if t.kind == "result":
            # The gradient of a loss begins as a constant, and is divided and spread as one.
            made = self._maker_of(p) if p.kind == "constant" else self._made_by.get(p)
            return made is not None and self.step(self._template.made_by[t], made, t, p)
        self.values[t] = p
        return True

    def step(self, t: Step, p: Step, of_t: Value, of_p: Value) -> bool:
        """Tell whether a template's step may stand for a program's, for one of the results."""
        if (
            t.primitive is not p.primitive
            or len(t.inputs) != len(p.inputs)
            or t.outputs.index(of_t) != p.outputs.index(of_p)
        ):
            return False
        if not self.params(t.params, p.params):
            return False
        orders = [p.inputs]
        if t.name in _COMMUTATIVE:
            orders.append(p.inputs[::-1])
        for inputs in orders:
            attempt = self.copy()
            if all(attempt.value(a, b) for a, b in zip(t.inputs, inputs, strict=True)):
                self._take(attempt)
                self.values.update(zip(t.outputs, p.outputs, strict=True))
                self.steps[t] = p
                return True
        return False

    def _shape(self, t: Value, p: Value) -> bool:
        """Compare shapes: a length of the template stands for any, and always for the same."""
        if len(t.shape) != len(p.shape):
            return False
        for a, b in zip(t.shape, p.shape, strict=True):
            if a in _LENGTHS.values() and b > 0:
                if self.lengths.setdefault(a, b) != b:
                    return False
            elif self.known(a) != b:
                return False
        return True

    def _type(self, t: Value, p: Value) -> bool:
        if t.dtype.kind == "f":
            if self.dtype is None and self._template.takes(p.dtype):
                self.dtype = p.dtype
            return bool(p.dtype == self.dtype)
        if t.kind == "result":
            return bool(t.dtype == p.dtype)
        return t.dtype.kind == "i" and p.dtype.kind in "iu"

    def params(self, t: dict[str, Any], p: dict[str, Any]) -> bool:
        """Compare the parameters of two calls."""
        return t.keys() == p.keys() and all(_equal(self.known(t[k]), p[k]) for k in t)

    def known(self, x: Any) -> Any:
        """Return what of a template's parameter is meant in the program."""
        if isinstance(x, tuple):
            return tuple(self.known(part) for part in x)
        if isinstance(x, np.dtype):
            return self.dtype if x == np.float32 else x
        if type(x) is not int or x < 2:
            return x
        lengths = self.lengths
        for a, b in itertools.combinations(lengths, 2):
            if a * b == x:
                return lengths[a] * lengths[b]
        return lengths.get(x, x)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _counts(x: Value) -> bool:
    """Tell whether a constant holds 0, 1, 2, ...: what picks an element in each row."""
    array = x.source._array
    return array.dtype.kind in "iu" and array.reshape(-1).tolist() == list(range(x.size))


def _constant(array: Any) -> Value:
    return Value("constant", array.shape, array.dtype, wrap(array))


# ---- finding and replacing


class _Search:
    """Looks for patterns in a program, and collects what replaces what."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._made_by = makers_of(program.steps)
        self._position = {step: i for i, step in enumerate(program.steps)}
        self._by_primitive: dict[Any, list[Step]] = {}
        for step in program.steps:
            self._by_primitive.setdefault(step.primitive, []).append(step)
        self._users = users_of(program.steps)
        self._outputs = set(program.output_values())
        self._instead: dict[Value, Value] = {}
        self._new: dict[int, list[Step]] = {}  # by the position before which they come

    def replace_both_ways(self, pattern: Pattern) -> None:
        """Replace a pattern and its gradients wherever they lie: of one result several may."""
        for step in self._places(pattern) if pattern.wrt else ():
            before, after = pattern.both_ways
            begun = self._compare(before, 0, step)
            for of_gradient in self._steps_like(before, 1) if begun is not None else ():
                found = self._compare(before, 1, of_gradient, begun)
                if found is not None:
                    self._take(*self._remade(before, after, found))

    def replace(self, pattern: Pattern) -> None:
        """Replace a pattern wherever it lies, if nothing of it is needed any more.

        A fused primitive computes, forward, what the pattern computes: beside it there is no gain.
        """
        for step in self._places(pattern):
            found = self._compare(pattern.before, 0, step)
            assert found is not None
            new, instead = self._remade(pattern.before, pattern.after, found)
            if self._all_die(found, instead):
                self._take(new, instead)

    def _places(self, pattern: Pattern) -> list[Step]:
        """Return the steps that compute the first result of a pattern."""
        template = pattern.before
        return [s for s in self._steps_like(template, 0) if self._compare(template, 0, s)]

    def _steps_like(self, template: _Template, output: int) -> list[Step]:
        return self._by_primitive.get(template.made_by[template.outputs[output]].primitive, [])

    def _compare(
        self, template: _Template, output: int, step: Step, begun: _Found | None = None
    ) -> _Found | None:
        if begun is None:
            begun = _Found(template, self._made_by, self._program.maker_of)
        found = begun.copy()
        t = template.outputs[output]
        position = template.made_by[t].outputs.index(t)
        p = step.outputs[position]
        return found if p not in self._instead and found.value(t, p) else None

    def _remade(
        self, before: _Template, after: _Template, found: _Found
    ) -> tuple[list[tuple[int, Step]], dict[Value, Value]]:
        """Return the steps that replace what was found, with their positions, and what they give.

        What two gradients share is made twice, and merged with all that is computed twice.
        """
        made = {
            a: found.values[b]
            for a, b in zip(after.inputs, before.inputs, strict=True)
            if b in found.values
        }
        new: list[tuple[int, Step]] = []
        instead: dict[Value, Value] = {}
        pairs = zip([found.values[t] for t in before.outputs], after.outputs, strict=True)
        # The first one first: between two of them there may be a use of it.
        for old, result in sorted(pairs, key=lambda pair: self._place_of(pair[0])):
            like, position = self._made_by[old], self._place_of(old)
            new += [(position, step) for step in _made(after, result, found, made, like)]
            instead[old] = made[result]
        return new, instead

    def _place_of(self, x: Value) -> int:
        return self._position[self._made_by[x]]

    def _all_die(self, found: _Found, instead: dict[Value, Value]) -> bool:
        """Tell whether nothing needs any of the steps found, once results are replaced."""
        dying = set(found.steps.values())
        return all(
            y in instead
            or (y not in self._outputs and all(user in dying for user in self._users.get(y, ())))
            for step in dying
            for y in step.outputs
        )

    def _take(self, new: list[tuple[int, Step]], instead: dict[Value, Value]) -> None:
        for position, step in new:
            self._new.setdefault(position, []).append(step)
        self._instead.update(instead)

    def finish(self) -> None:
        """Give the program its new steps."""
        program, instead = self._program, self._instead
        steps: list[Step] = []
        for i, step in enumerate(program.steps):
            steps += self._new.get(i, ())
            steps.append(step)
        for step in steps:
            step.inputs = tuple(replaced(step.inputs, instead))
        program.steps = steps
        program.outputs = list(replaced(program.outputs, instead))


def _made(
    template: _Template, result: Value, found: _Found, made: dict[Value, Value], like: Step
) -> Iterator[Step]:
    """Yield the steps that make a template's result of values of the program."""
    step = template.made_by.get(result)
    if step is None or result in made:
        return
    for x in step.values():
        yield from _made(template, x, found, made, like)
    inputs = list(replaced(step.inputs, made))
    params = {name: found.known(x) for name, x in step.params.items()}
    if all(type(x) is not Value or x.kind == "constant" for x in inputs):
        arrays = [x.source._array if type(x) is Value else x for x in inputs]
        made[result] = _constant(step.primitive.compute(arrays, params))
        return
    outputs = [Value("result", found.known(y.shape), found.known(y.dtype)) for y in step.outputs]
    made.update(zip(step.outputs, outputs, strict=True))
    yield like.instead(step.primitive, inputs, outputs, params)


def rewrite_by(patterns: Sequence[Pattern], *needs: str, bound: str = "") -> Rewrite:
    """Return the rewrite by patterns.

    needs  names of primitives: in a program without one of each group there is none of them.
    """

    def run(program: Program) -> None:
        names = {step.name for step in program.steps}
        if any(names.isdisjoint(group.split()) for group in needs):
            return
        search = _Search(program)
        for pattern in patterns:
            search.replace_both_ways(pattern)
        for pattern in patterns:
            search.replace(pattern)
        search.finish()

    return Rewrite(run, bound)
