"""GradientTape: the list of operations as they ran, and the reverse pass over it."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeAlias

import numpy as np

from tapegrad import _backend
from tapegrad._pullback import Pullback
from tapegrad._quiet import quiet
from tapegrad._recording import Call, no_record, state, told, user_call, user_location
from tapegrad._reverse import gradients
from tapegrad._reverse_text import can_be_replayed
from tapegrad._structure import flatten_with_paths, is_container, refuse_unordered, unflatten
from tapegrad._tape_arguments import (
    UnconnectedGradients,
    check_chunk,
    check_flag,
    check_scalar_targets,
    check_sources,
    check_targets,
    check_unconnected,
    describe_kind,
    is_floating,
    match_weights,
)
from tapegrad.errors import TapeWarning
from tapegrad.linear import add, fit, ones_like, permute, reshape, stack, zeros_like
from tapegrad.primitive import Primitive, primitives
from tapegrad.tensor import Operand, Tensor, as_array, wrap
from tapegrad.variable import Variable

_USED_UP = (
    "A non-persistent GradientTape can only be used to compute one set of gradients (or jacobians)"
)
_NONE = UnconnectedGradients.NONE  # asking an enumeration for it takes 0.1 us


class Spec:
    """What a node keeps of a Tensor whose values no rule reads."""

    __slots__ = ("dtype", "id", "shape")

    def __init__(self, id: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.id = id
        self.shape = shape
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


# One recorded call of a primitive. Immutable: it may lie on several tapes. A plain tuple, since a
# named one takes 0.1 us more to make, a tenth of what it costs to record an operation:
#   primitive
#   inputs   each a Tensor where a rule reads it, its Spec where none does, or a Python number
#   outputs  each a Tensor if a rule reads it, or its Spec
#   params   the settings of the call
#   mask     bit i is set if some tape watched input i when the call ran
#   where    file:line of the call, for a primitive that has no rule
Node: TypeAlias = tuple[
    Primitive, tuple[Any, ...], tuple[Any, ...], dict[str, Any], int, str | None
]

_new = object.__new__
_SCALARS = frozenset((np.float16, np.float32, np.float64))


def _spec(x: Tensor) -> Spec:
    spec, array = _new(Spec), x._array
    spec.id, spec.shape, spec.dtype = x.id, array.shape, array.dtype
    return spec


def _node(
    primitive: Primitive,
    inputs: Sequence[Any],
    outputs: tuple[Tensor, ...],
    params: dict[str, Any],
    mask: int,
) -> Node:
    count = len(inputs)
    dropped, keep_output = primitive.saved.get((mask, count)) or primitive.saved_for(mask, count)
    saved: Any = inputs
    for i in dropped:
        x = inputs[i]
        if type(x) is Tensor and x._array.ndim:  # one number is no more than its Spec: it stays
            if saved is inputs:
                saved = list(inputs)
            saved[i] = _spec(x)
    results: tuple[Any, ...] = outputs
    if not keep_output:
        if len(outputs) > 1:
            results = tuple([_spec(y) for y in outputs])
        elif outputs[0]._array.ndim:
            results = (_spec(outputs[0]),)
    where = None if primitive.vjps or primitive.joint_vjp else user_location()
    return primitive, tuple(saved), results, params, mask, where


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


_NEVER = sys.maxsize
_BITS = tuple(_bits(mask) for mask in range(64))  # most operations have few inputs


class GradientTape:
    """Record operations for automatic differentiation, as `tf.GradientTape` does.

    persistent                whether more than one gradient may be taken; the tape then keeps
                              what it recorded until it is dropped.
    watch_accessed_variables  whether trainable Variables are watched when they are read.

    An operation is recorded if a floating input of it is watched: a trainable Variable, what
    `watch` was given, or the result of a recorded operation. Each thread records its own
    operations. Raises `TypeError` for arguments that are not bool.

    >>> import tapegrad as tg
    >>> x = tg.Variable(3.0)
    >>> with tg.GradientTape() as tape:
    ...     y = x * x
    >>> print(tape.gradient(y, x))
    tg.Tensor(6.0, shape=(), dtype=float32)
    """

    lasting = False  # no_record hides things from it
    since = 0

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._persistent = check_flag("persistent", persistent)
        self._watch_accessed = check_flag("watch_accessed_variables", watch_accessed_variables)
        self._active = False  # inside its `with` block
        self._paused = 0  # inside so many stop_recording blocks
        self._recorders: list[Any] | None = None  # the list it stands in while it records
        self._thread = 0
        self._entered = False
        self._next_watch: list[Operand] = []  # watched while used up: for the next block
        self._forget()

    def _forget(self) -> None:
        self._release()
        self._variables: dict[int, Variable] = {}
        self._asked: set[int] = set()  # ids of Variables given to watch()
        # How it was used up: by which call, or what went wrong in it.
        self._spent: Call | str | None = None

    def _release(self) -> None:
        """Let go of every operation, keeping what `watched_variables` tells."""
        self._nodes: list[Node] = []
        # What is watched, by id, and from which node on: earlier uses of it do not count.
        self._watched: dict[int, int] = {}
        self._leaves: set[int] = set()
        self._versions: dict[int, list[int]] = {}  # of each Variable, the ids of its values
        # Unwatched floats that were used, by what and where first; which of them were watched then.
        self._used: dict[int, tuple[str, Call]] = {}
        self._late: dict[int, tuple[str, Call]] = {}

    # ---- recording

    def __enter__(self) -> GradientTape:
        if self._active:
            if self._thread != threading.get_ident():
                raise RuntimeError(
                    "this tape is recording on another thread: give each thread a tape of its own"
                )
            raise ValueError(
                "Tape is still recording, This can happen if you try to re-enter an "
                "already-active tape."
            )
        if self._spent is not None:
            self._forget()
        self._active = self._entered = True
        self._paused = 0
        self._thread = threading.get_ident()
        self._start()
        if self._next_watch:
            for x in self._next_watch:
                self._watch(x)
            self._next_watch = []
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._active = False

    def _start(self) -> None:
        self._recorders = state.recorders
        self._recorders.append(self)

    def _stop(self) -> None:
        recorders, self._recorders = self._recorders, None
        if recorders is None:
            return
        if recorders and recorders[-1] is self:
            recorders.pop()
        else:
            recorders[:] = [recorder for recorder in recorders if recorder is not self]

    def record(
        self,
        primitive: Primitive,
        inputs: Sequence[Any],
        outputs: tuple[Tensor, ...],
        params: dict[str, Any],
        node: Node | None,
    ) -> Node | None:
        """Note one call of a primitive, if a floating input of it is watched."""
        if not primitive.differentiable:
            return node
        watched = self._watched
        mask, bit = 0, 1
        for x in inputs:
            if type(x) is Tensor:
                key = x.id
                if key in watched:
                    mask |= bit
                elif key not in self._used:
                    self._note_use(x, primitive)
            bit <<= 1
        if not mask:
            return node
        if node is None or mask & ~node[4]:
            node = _node(primitive, inputs, outputs, params, mask)
        nodes = self._nodes
        nodes.append(node)
        position = len(nodes)
        for y in outputs:
            watched[y.id] = position
        return node

    def _note_use(self, x: Tensor, primitive: Primitive) -> None:
        if is_floating(x._array.dtype):
            self._used[x.id] = primitive.name, user_call()

    def accessed(self, variable: Variable, version: Tensor) -> None:
        """Note that a Variable was read."""
        if version.id in self._watched:
            return
        if (self._watch_accessed and variable._trainable) or variable.id in self._asked:
            self._watch_version(variable, version)

    def writing(self, variable: Variable) -> None:
        """Let a Variable change: what was recorded of it keeps the value that was read."""

    def _watch_version(self, variable: Variable, version: Tensor) -> None:
        dtype = version._array.dtype
        if dtype.kind != "f" and not is_floating(dtype):
            return
        key, name = version.id, variable.id
        self._watch_id(key)
        versions = self._versions.get(name)
        if versions is None:
            self._versions[name] = [key]
            self._variables[name] = variable
        elif key not in versions:
            versions.append(key)

    def _watch_id(self, key: int) -> None:
        if key in self._watched:
            return
        self._watched[key] = len(self._nodes)
        self._leaves.add(key)
        if key in self._used:
            self._late[key] = self._used[key]

    def watches(self, x: Operand) -> bool:
        """Tell whether what is computed from `x` now is recorded."""
        return x._read().id in self._watched

    def watch(self, tensor: Any, *others: Any) -> None:
        """Watch a Tensor or Variable, or every one in a structure of them.

        Operations that ran before are not recorded. On a tape that is not recording it counts from
        its next block on. Raises `TypeError` for what is neither (and then watches nothing);
        warns for integer and boolean ones, which have no gradient.
        """
        if others:
            raise TypeError("watch takes one argument: write tape.watch([x, y])")
        refuse_unordered(tensor, "tensor")
        leaves = flatten_with_paths(tensor, "tensor")
        if is_container(tensor) and not leaves:
            warnings.warn(
                "watch was given nothing to watch: a model may not have built its variables yet",
                TapeWarning,
                stacklevel=2,
            )
        for path, leaf in leaves:
            if not isinstance(leaf, Operand):
                raise TypeError(
                    f"watch needs a Tensor or Variable, but {path} is {describe_kind(leaf)}: "
                    "make it one first, x = tg.constant(x), and compute with that"
                )
        for path, leaf in leaves:
            if not is_floating(leaf.dtype):
                warnings.warn(
                    f"{path} has dtype {leaf.dtype} and can have no gradient: "
                    "only floating tensors can be watched",
                    TapeWarning,
                    stacklevel=2,
                )
            elif self._spent is not None and self._recorders is None:
                self._next_watch.append(leaf)
            else:
                self._watch(leaf)

    def _watch(self, x: Operand) -> None:
        if isinstance(x, Variable):
            self._asked.add(x.id)
            self._watch_version(x, _current(x))
        else:
            self._watch_id(x.id)

    def watched_variables(self) -> tuple[Variable, ...]:
        """Return the Variables that this tape watches, in the order of their construction."""
        return tuple(self._variables[key] for key in sorted(self._variables))

    @contextmanager
    def stop_recording(self) -> Iterator[None]:
        """Let this tape overlook what happens in a `with` block; other tapes go on.

        Raises `RuntimeError` if the tape was never entered, `ValueError` outside its block.
        """
        if not self._entered:
            raise RuntimeError("Trying to stop recording a tape which is not recording.")
        if not self._active:
            raise ValueError("Tape is not recording.")
        self._paused += 1
        self._stop()
        try:
            yield
        finally:
            self._paused -= 1
            if self._active and not self._paused:
                if self._spent is not None:
                    self._forget()
                self._start()

    def reset(self) -> None:
        """Forget all operations and everything watched; inside its block the tape records on."""
        self._forget()
        if self._active and not self._paused and self._recorders is None:
            self._start()  # an inner gradient had stopped it

    # ---- the reverse pass

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
    ) -> Any:
        """Return the gradient of the sum of the target's elements for each source.

        target                a Tensor or Variable, or a structure of them (their sum is meant).
        sources               likewise; the answer has the structure of the sources, and each
                              gradient its source's shape and dtype.
        output_gradients      weights of the target's elements, of its structure and shapes, where
                              None stands for ones: the answer is a vector-Jacobian product.
        unconnected_gradients `"none"`, `"zero"` or `"raise"`: what a source gets that the target
                              does not depend on.

        A tape that is not persistent can answer once, and stops recording. Raises `TypeError` and
        `ValueError` for wrong arguments (the tape stays usable), `RuntimeError` for a tape that is
        used up or has recorded nothing.

        >>> import tapegrad as tg
        >>> x, y = tg.Variable(3.0), tg.Variable(5.0)
        >>> with tg.GradientTape() as tape:
        ...     z = (x**2 + y**2) ** 2
        >>> tape.gradient(z, {"x": x})
        {'x': <tg.Tensor: shape=(), dtype=float32, numpy=408.0>}
        """
        unconnected = check_unconnected(unconnected_gradients)
        targets = check_targets(target)
        leaves = check_sources(sources)
        weights = match_weights(target, output_gradients)
        check_scalar_targets(targets, weights)
        self._check_usable()
        self._begin_reverse_pass(user_call())
        try:
            with quiet():
                # Who records must hear what the rules do, and kernels may take over on a GPU.
                if self._late or state.recorders or not _backend.numpy_alone:
                    answers = self._interpreted(targets, leaves, weights)
                else:
                    answers = gradients(self, targets, leaves, weights)
                return self._answered(answers, leaves, unconnected, sources)
        finally:
            self._end_reverse_pass()

    def _interpreted(
        self,
        targets: Sequence[Operand],
        sources: Sequence[Operand],
        weights: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """Return the gradients of the targets' weighted sum, by the rules of what was recorded."""
        seeds: dict[int, Tensor] = {}
        for y, weight in zip(map(_current, targets), weights, strict=True):
            if is_floating(y._array.dtype):
                seed = ones_like(y) if weight is None else weight
                seeds[y.id] = add(seeds[y.id], seed) if y.id in seeds else seed
        wanted = self._wanted(sources)
        results = self._pull_back(seeds, wanted, consume=not self._persistent)
        return [self._answer(source, results) for source in sources]

    def jacobian(
        self,
        target: Any,
        sources: Any,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
        chunk_size: int | None = None,
    ) -> Any:
        """Return the derivative of every element of the target for every element of the sources.

        Each answer has the shape `target.shape + source.shape`. For a structure of targets it is
        a structure of what one target gives. Rows, one for each element of the target, are
        computed many at a time: `chunk_size` says how many, else as many as keep what they need
        on the way small. `parallel_iterations` is TensorFlow's name of it, and without
        `experimental_use_pfor` it is one at a time, as it always is through gradients of your
        own. A tape that is not persistent will do. Raises as `gradient` does.

        >>> import tapegrad as tg
        >>> x = tg.Variable([1.0, 2.0])
        >>> with tg.GradientTape() as tape:
        ...     y = x * x
        >>> tape.jacobian(y, x).numpy().tolist()
        [[2.0, 0.0], [0.0, 4.0]]
        """
        unconnected = check_unconnected(unconnected_gradients)
        targets = check_targets(target)
        leaves = check_sources(sources)
        chunk = check_chunk(chunk_size, parallel_iterations, experimental_use_pfor)
        self._check_usable()
        self._begin_reverse_pass(user_call())
        try:
            with quiet():
                answers = []
                for y in targets:
                    found = self._rows(y, leaves, y.size, _basis_seeds, chunk)
                    rows = [
                        None if r is None else reshape(r, shape=y.shape + x.shape)
                        for r, x in zip(found, leaves, strict=True)
                    ]
                    answers.append(self._answered(rows, leaves, unconnected, sources, y.shape))
                return unflatten(target, answers)
        finally:
            self._end_reverse_pass()

    def batch_jacobian(
        self,
        target: Any,
        source: Any,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
        chunk_size: int | None = None,
        check: bool = False,
    ) -> Any:
        """Return each example's own Jacobian: `target[i]` for `source[i]`, stacked.

        The answer has the shape `(batch, *target.shape[1:], *source.shape[1:])`; for a structure
        of sources, a structure of these. It is right only where examples do not depend on each
        other (no batch normalisation): `check=True` verifies this with one more reverse pass and
        raises `ValueError` if they do. An unconnected source gives zeros. The other arguments
        are as for `jacobian`.
        """
        unconnected = check_unconnected(unconnected_gradients)
        (y,) = check_targets([target])
        leaves = check_sources(source)
        chunk = check_chunk(chunk_size, parallel_iterations, experimental_use_pfor)
        for x in leaves:
            for shape in (y.shape, x.shape):
                if len(shape) < 2:
                    raise ValueError(
                        f"Shape {shape} must have rank at least 2 (a batch of vectors); "
                        "for anything else use jacobian"
                    )
            if y.shape[0] != x.shape[0]:
                raise ValueError(
                    f"Need first dimension of target shape ({y.shape}) and source shape "
                    f"({x.shape}) to match."
                )
        self._check_usable()
        self._begin_reverse_pass(user_call())
        try:
            with quiet():
                found = self._rows(y, leaves, math.prod(y.shape[1:]), _batch_seeds, chunk)
                answers: list[Tensor | None] = []
                for rows, x in zip(found, leaves, strict=True):
                    shape = y.shape + x.shape[1:]
                    if rows is not None:
                        if check:
                            self._check_independent(y, x, rows)
                        rows = permute(rows, axes=(1, 0, *range(2, len(rows.shape))))
                        rows = reshape(rows, shape=shape)
                    elif unconnected != "raise":  # zeros, as TensorFlow gives for "none" too
                        rows = wrap(_backend.module_of((x._array,)).zeros(shape, x.dtype))
                    answers.append(rows)
                return self._answered(answers, leaves, unconnected, source)
        finally:
            self._end_reverse_pass()

    def _rows(
        self,
        target: Operand,
        sources: list[Operand],
        count: int,
        seeds_of: Callable[[Tensor, int, int], Tensor],
        chunk: int | None,
    ) -> list[Tensor | None]:
        """Pull back `count` seeds; return for each source the answers stacked along a new axis 0.

        chunk  how many at a time; None: as many as suit the memory.
        """
        if not is_floating(target.dtype):
            return [None] * len(sources)
        y = _current(target)
        wanted = self._wanted(sources)

        def pull_back(seed: Tensor) -> list[Tensor | None]:
            results = self._pull_back({y.id: seed}, wanted, consume=False)
            return [self._answer(x, results) for x in sources]

        if not count:  # a target without elements: no row, but is there a path?
            xp = _backend.module_of((y._array,))
            return [
                None if g is None else wrap(xp.zeros((0, *x.shape), x.dtype))
                for g, x in zip(pull_back(ones_like(y)), sources, strict=True)
            ]
        if count > 1 and chunk != 1 and all(can_be_replayed(node[0]) for node in self._nodes):
            pullback = Pullback(ones_like(y), pull_back)
            size = chunk or max(1, _ROW_BYTES // pullback.widest)
            parts = [pullback(seeds_of(y, i, min(i + size, count))) for i in range(0, count, size)]
            return [_joined(column) for column in zip(*parts, strict=True)]
        rows = [pull_back(reshape(seeds_of(y, i, i + 1), shape=y.shape)) for i in range(count)]
        return [
            None
            if all(g is None for g in column)
            else stack(*[zeros_like(x) if g is None else g for g in column])
            for column, x in zip(zip(*rows, strict=True), sources, strict=True)
        ]

    def _check_independent(self, y: Operand, x: Operand, rows: Tensor) -> None:
        """Compare one pull-back of random weights a row with what independence says it gives."""
        weights = np.random.default_rng(0).uniform(1.0, 2.0, y.shape[0]).astype(y.dtype)
        here = wrap(as_array(weights, xp=_backend.module_of((y._array,))))
        seed = ones_like(y) * reshape(here, shape=(-1,) + (1,) * (y.ndim - 1))
        got = self._answer(x, self._pull_back({_current(y).id: seed}, self._wanted([x]), False))
        want = rows.numpy().sum(0) * weights.reshape((-1,) + (1,) * (x.ndim - 1))
        scale = float(np.abs(want).max(initial=0.0)) + float(np.finfo(want.dtype).tiny)
        difference = (zeros_like(x) if got is None else got).numpy() - want
        error = float(np.abs(difference).max(initial=0.0))
        if error > scale * 100 * float(np.finfo(want.dtype).eps) * y.size:
            raise ValueError(
                "batch_jacobian: examples depend on each other (rows of the target change with "
                "other rows of the source), so their Jacobian is no batch: use jacobian"
            )

    def _begin_reverse_pass(self, where: Call) -> None:
        """Stop recording, unless the tape is one that may record its own reverse pass."""
        if not self._persistent:
            self._stop()
        elif self._recorders is state.recorders:  # not so inside no_record
            _warn_of_recorded_gradient()
        if not self._persistent:
            self._spent = where

    def _end_reverse_pass(self) -> None:
        """Let go of everything, unless the tape may be asked again."""
        if not self._persistent:
            self._release()

    def _check_usable(self) -> None:
        if self._active and self._thread != threading.get_ident():
            raise RuntimeError(
                "this tape is recording on another thread: take the gradient there, "
                "or after that thread has left the tape's block"
            )
        if self._spent is not None:
            error = RuntimeError(_USED_UP)
            how = self._spent
            if type(how) is tuple:
                how = f"the first one was asked for at {told(how)}"
            error.add_note(
                f"{how}. To ask more than once, create the tape with "
                "GradientTape(persistent=True), or pass all sources in one call."
            )
            raise error
        if not self._entered:
            raise RuntimeError(
                "this tape has not recorded anything: compute the target inside `with tape:`"
            )

    def _wanted(self, sources: Sequence[Operand]) -> set[int]:
        return {key for x in sources for key in self._values_of(x)}

    def _values_of(self, source: Operand) -> Sequence[int]:
        """Return the ids of what a source was while the tape recorded."""
        if not isinstance(source, Variable):
            return (source.id,)
        keys = self._versions.get(source.id, ())
        current = source._tensor  # the target itself, perhaps
        return keys if current is None or current.id in keys else (*keys, current.id)

    def _needed(self, wanted: set[int]) -> dict[int, int]:
        """Return the ids between the wanted ones and any target, and from which node they count."""
        if not self._late and self._leaves <= wanted:
            return self._watched  # every path begins at a source
        needed = {key: self._watched[key] for key in wanted if key in self._watched}
        for index, (primitive, inputs, outputs, _, mask, _) in enumerate(self._nodes):
            vjps = primitive.vjps
            for i in _BITS[mask] if mask < 64 else _bits(mask):
                since = needed.get(inputs[i].id)
                if since is not None and since <= index and (not vjps or vjps[i] is not None):
                    for y in outputs:
                        needed.setdefault(y.id, index + 1)
                    break
        return needed

    def _pull_back(
        self, seeds: dict[int, Tensor], wanted: set[int], consume: bool
    ) -> dict[int, Tensor]:
        """Run the rules from the last operation to the first; return the wanted ids' gradients."""
        needed = self._needed(wanted)
        gradients = dict(seeds)
        results: dict[int, Tensor] = {}
        nodes = self._nodes
        for index in range(len(nodes) - 1, -1, -1):
            node = nodes.pop() if consume else nodes[index]
            outputs = node[2]
            y: Any
            g: Any
            if len(outputs) == 1:
                y = outputs[0]
                g = gradients.pop(y.id, None)
                if g is None:
                    continue
                if y.id in wanted:
                    results[y.id] = g
            else:
                y = outputs
                g = tuple([gradients.pop(part.id, None) for part in outputs])
                for part, part_g in zip(outputs, g, strict=True):
                    if part_g is not None and part.id in wanted:
                        results[part.id] = part_g
                if all(part_g is None for part_g in g):
                    continue
            try:
                _pull_through(node, index, g, y, needed, gradients)
            except Exception as error:
                error.add_note(f"raised in the gradient of {node[0].name}")
                if not self._persistent:
                    self._spent = f"an earlier gradient() failed in {node[0].name}"
                raise
        for key in wanted:
            if key in gradients:
                results[key] = gradients[key]
        return results

    def _answer(self, source: Operand, results: dict[int, Tensor]) -> Tensor | None:
        total: Tensor | None = None
        for key in self._values_of(source):
            part = results.get(key)
            if part is not None:
                total = part if total is None else add(total, part)
        return total

    def _answered(
        self,
        answers: list[Any],
        leaves: list[Operand],
        unconnected: UnconnectedGradients,
        sources: Any,
        lead: tuple[int, ...] = (),
    ) -> Any:
        """Return the answers in the structure of the sources, the missing ones filled in."""
        if self._late:
            self._warn_of_late_watch(leaves)
        if unconnected is not _NONE:
            self._fill_in(answers, leaves, unconnected, sources, lead)
        return answers if leaves is sources else unflatten(sources, answers)

    def _fill_in(
        self,
        answers: list[Any],
        leaves: list[Operand],
        unconnected: UnconnectedGradients,
        sources: Any,
        lead: tuple[int, ...],
    ) -> None:
        """Make zeros of missing answers, or raise `ValueError`."""
        missing = [i for i, answer in enumerate(answers) if answer is None]
        if missing and unconnected is UnconnectedGradients.RAISE:
            paths = [path for path, _ in flatten_with_paths(sources, "sources")]
            lost = [f"{paths[i]} ({self._why_unconnected(leaves[i])})" for i in missing]
            raise ValueError("the target does not depend on " + "; ".join(lost))
        for i in missing:
            x = leaves[i]
            xp = _backend.module_of((x._array,))
            answers[i] = wrap(xp.zeros(lead + x.shape, x.dtype))

    def _why_unconnected(self, source: Operand) -> str:
        if not is_floating(source.dtype):
            return f"dtype {source.dtype} has no gradient: write 3.0 for 3"
        if not isinstance(source, Variable):
            watched = source.id in self._watched
            return "no recorded path leads to it" if watched else "this tape does not watch it"
        name = f"variable {source.name!r}"
        if self._versions.get(source.id):
            return f"{name} was read, but no recorded path leads to it"
        if not source.trainable and source.id not in self._asked:
            return f"{name} is not trainable and was not watched"
        return f"{name} was not read while the tape recorded"

    def _warn_of_late_watch(self, sources: list[Operand]) -> None:
        for x in sources:
            for key in self._wanted([x]):
                if key in self._late:
                    name, call = self._late[key]
                    warnings.warn(
                        f"a source was used by {name} at {told(call)} before it was "
                        "watched: that use has no part in the gradient; watch it first",
                        TapeWarning,
                        stacklevel=4,
                    )

    def __repr__(self) -> str:
        saved = {
            x.id: x.nbytes
            for _, inputs, outputs, *_ in self._nodes
            for x in (*inputs, *outputs)
            if type(x) is Tensor
        }
        doing = "recording" if self._recorders is not None else "holding"
        return (
            f"<GradientTape persistent={self._persistent} {doing} {len(self._nodes)} ops, "
            f"{len(self._variables)} variables, {sum(saved.values()) / 2**20:.1f} MiB>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a GradientTape cannot be pickled or copied: keep the gradients, which can")


def _pull_through(
    node: Node,
    index: int,
    g: Any,
    y: Any,
    needed: dict[int, int],
    gradients: dict[int, Tensor],
) -> None:
    """Run one node's rules and add what they answer to its inputs' gradients."""
    primitive, inputs, _, params, mask, _ = node
    rules: Any = primitive.vjps
    answers: Any = None  # of a rule for all inputs at once
    for i in _BITS[mask] if mask < 64 else _bits(mask):
        x = inputs[i]
        key = x.id
        if needed.get(key, _NEVER) > index:
            continue
        if not rules:
            if answers is None:
                answers = _pull_through_all(node, index, g, y, needed)
            answer = answers[i]
        else:
            rule = rules[i]
            if rule is None:
                continue
            # Spreading inputs and settings over a call takes 0.2 us more than naming them.
            if params:
                answer = rule(g, y, *inputs, **params)
            elif len(inputs) == 2:
                answer = rule(g, y, inputs[0], inputs[1])
            elif len(inputs) == 1:
                answer = rule(g, y, x)
            else:
                answer = rule(g, y, *inputs)
        if answer is None:
            continue
        # At the input's own shape and type, whatever was spread or promoted.
        array = answer._array
        source = x._array if type(x) is Tensor else x
        kind = type(array)  # two of NumPy's scalars of one type need no further question
        if (kind is not type(source) or kind not in _SCALARS) and (
            array.shape != source.shape or array.dtype != source.dtype
        ):
            answer = fit(answer, source.shape, source.dtype)
        earlier = gradients.get(key)
        gradients[key] = answer if earlier is None else add(earlier, answer)


def _pull_through_all(node: Node, index: int, g: Any, y: Any, needed: dict[int, int]) -> Any:
    """Run the rule that gives the gradients of all inputs of a node at once."""
    primitive, inputs, _, params, mask, where = node
    if primitive.joint_vjp is None:
        raise LookupError(
            f"no gradient rule is defined for {primitive.name}, called at {where}: "
            "wrap the call in tg.custom_gradient, or in tg.stop_gradient"
        )
    needs = [False] * len(inputs)
    for i in _BITS[mask] if mask < 64 else _bits(mask):
        needs[i] = needed.get(inputs[i].id, _NEVER) <= index
    return primitive.joint_vjp(tuple(needs), g, y, *inputs, **params)


def _current(x: Operand) -> Tensor:
    """Return an operand's value now, without any tape taking it for a use."""
    if not isinstance(x, Variable) or not state.recorders:
        return x._read()
    with no_record():
        return x._read()


_warned_of_recorded_gradient = False


def _warn_of_recorded_gradient() -> None:
    global _warned_of_recorded_gradient
    if not _warned_of_recorded_gradient:
        _warned_of_recorded_gradient = True
        warnings.warn(
            "calling gradient on a persistent tape inside its own block records the reverse pass "
            "too, which costs time and memory: unless you want higher derivatives, call it "
            "outside, or inside `with tape.stop_recording():`",
            TapeWarning,
            stacklevel=4,
        )


# ---- rows of Jacobians

# The largest value on the way of some rows has at most so many bytes: they stay near the cores.
_ROW_BYTES = 1 << 23


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the rows of all chunks as one Tensor."""
    if parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else primitives["concat"](*parts, axis=0)


def _basis_seeds(y: Tensor, first: int, last: int) -> Tensor:
    """Return, for each of some elements of y, a seed that is one there and zero elsewhere."""
    xp = _backend.module_of((y._array,))
    rows = last - first
    return wrap(xp.eye(rows, y.size, first, y.dtype).reshape(rows, *y.shape))


def _batch_seeds(y: Tensor, first: int, last: int) -> Tensor:
    """Return, for each of some elements of a row of y, a seed that is one there in every row."""
    xp = _backend.module_of((y._array,))
    rows, batch = last - first, y.shape[0]
    of_a_row = xp.eye(rows, math.prod(y.shape[1:]), first, y.dtype)
    return wrap(xp.repeat(of_a_row[:, None], batch, 1).reshape(rows, *y.shape))
