"""Pullback: the operations of one reverse pass, made again for many upstream gradients at once.

A row of a Jacobian is a reverse pass. The rules see shapes, types and settings only, and values
never: so all rows make the same calls, and those of one row, written down, can be made for all of
them, with an axis more in front of every value that depends on the upstream gradient. Of each
primitive that is a rule of its own; one that has none here is called row by row.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tapegrad._index import FULL, SLOT
from tapegrad._recording import PassRecorder, alone, state
from tapegrad.formulas import formulas
from tapegrad.linear import broadcast_to, permute, reshape, row, stack, sum_to
from tapegrad.primitive import Primitive, primitives
from tapegrad.tensor import Tensor


class _Varying(NamedTuple):
    """Stands for a value that depends on the upstream gradient, of which it keeps no memory."""

    id: int
    shape: tuple[int, ...]


class _Call(NamedTuple):
    """One call of a primitive, on tensors that last, numbers, and what varies."""

    primitive: Primitive
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    params: dict[str, Any]

    @property
    def varies(self) -> tuple[bool, ...]:
        """Of each input whether it does."""
        return tuple([type(x) is _Varying for x in self.inputs])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first result, for one row."""
        return tuple(self.outputs[0].shape)


class Pullback(PassRecorder):
    """Listens while `pull_back(seed)` runs, and then does the same for many seeds.

    Not through gradients of the user's own, which may look at values and change state.

    widest  the bytes of the largest value that depends on the seed.
    """

    def __init__(
        self, seed: Tensor, pull_back: Callable[[Tensor], Sequence[Tensor | None]]
    ) -> None:
        self.widest = max(1, seed.nbytes)
        self._seed = _Varying(seed.id, seed.shape)
        self._varying = {seed.id: self._seed}
        self._calls: list[_Call] = []
        self._fixed: dict[int, Tensor] = {}  # by id: what the seed is not in, if it was made anew
        with alone(self):
            answers = pull_back(seed)
        self._answers = [None if g is None else self._seen(g) for g in answers]
        # The call that is the last to use a value; answers outlast them all.
        self._ends = {
            x: i
            for i, values in enumerate([*(call.inputs for call in self._calls), self._answers])
            for x in values
            if type(x) is _Varying
        }

    def _seen(self, x: Any) -> Any:
        return self._varying.get(x.id, x) if type(x) is Tensor else x

    def record(
        self,
        primitive: Primitive,
        inputs: Sequence[Any],
        outputs: tuple[Tensor, ...],
        params: dict[str, Any],
        node: Any,
    ) -> Any:
        """Write down one call."""
        call = _Call(primitive, tuple(map(self._seen, inputs)), outputs, params)
        if any(call.varies):
            self._varying.update((y.id, _Varying(y.id, y.shape)) for y in outputs)
            self.widest = max(self.widest, *(y.nbytes for y in outputs))
            call = call._replace(outputs=tuple(map(self._seen, outputs)))
        self._calls.append(call)
        return node

    def _object(self, *_: Any) -> None:
        raise AssertionError("a primitive's rule looks at values, or reads or writes state")

    accessed = writing = updated = leaving = copied = created = _object

    def __call__(self, seeds: Tensor) -> list[Tensor | None]:
        """Return the answers for all seeds, which lie along the first axis, as theirs do."""
        rows = seeds.shape[0]
        values = {self._seed: seeds}
        for i, call in enumerate(self._calls):
            if any(call.varies):
                xs = [self._value(x, values) for x in call.inputs]
                values.update(zip(call.outputs, _called(call, xs, rows), strict=True))
                for x in call.inputs:
                    if type(x) is _Varying and self._ends[x] == i:
                        values.pop(x, None)
            elif state.recorders and call.outputs[0].id not in self._fixed:
                self._fixed.update(self._again(call))
        return [None if g is None else self._answer(g, values, rows) for g in self._answers]

    def _again(self, call: _Call) -> Iterator[tuple[int, Tensor]]:
        """Make a call that has nothing to do with the seed anew, for those who listen now."""
        results: Any = call.primitive(*[self._value(x, {}) for x in call.inputs], **call.params)
        results = results if type(results) is tuple else (results,)
        return zip([y.id for y in call.outputs], results, strict=True)

    def _value(self, x: Any, values: dict[_Varying, Tensor]) -> Any:
        if type(x) is _Varying:
            return values[x]
        return self._fixed.get(x.id, x) if type(x) is Tensor else x

    def _answer(self, g: Any, values: dict[_Varying, Tensor], rows: int) -> Tensor:
        y: Tensor = self._value(g, values)
        return y if type(g) is _Varying else broadcast_to(y, shape=(rows, *g.shape))


# ---- one call for many rows
#
# A rule gets the call, its inputs, those that vary with the rows along a new first axis, and how
# many rows there are. It answers the results, with the rows along theirs, or None.

_Results = Sequence[Tensor] | None
_Rule = Callable[[_Call, list[Any], int], _Results]


def _called(call: _Call, xs: list[Any], rows: int) -> Sequence[Tensor]:
    name = call.primitive.name
    rule = _RULES.get(name) or (_elementwise if name in formulas else _row_by_row)
    results = rule(call, xs, rows)
    return _row_by_row(call, xs, rows) if results is None else results


def _row_by_row(call: _Call, xs: list[Any], rows: int) -> Sequence[Tensor]:
    found = []
    for i in range(rows):
        of_row = [row(x, index=i) if v else x for x, v in zip(xs, call.varies, strict=True)]
        results: Any = call.primitive(*of_row, **call.params)
        found.append(results if type(results) is tuple else (results,))
    return [stack(*results) for results in zip(*found, strict=True)]


def _aligned(call: _Call, xs: list[Any]) -> list[Any]:
    """Return inputs that broadcast as they did, with the rows in front."""
    rank = len(call.shape)
    return [
        reshape(x, shape=(x.shape[0], *(1,) * (rank + 1 - x.ndim), *x.shape[1:]))
        if varies and x.ndim <= rank
        else x
        for x, varies in zip(xs, call.varies, strict=True)
    ]


def _elementwise(call: _Call, xs: list[Any], _rows: int) -> _Results:
    results: Any = call.primitive(*_aligned(call, xs), **call.params)
    return results if type(results) is tuple else (results,)


def _product(call: _Call, xs: list[Any], rows: int) -> _Results:
    """Make one product of all rows, where one factor has them and the other is a matrix.

    It takes a fraction of the time of a product for each row.
    """
    (x1, x2), name, shape = xs, call.primitive.name, call.shape
    if call.varies == (True, False) and x2.ndim == 2 and name != "matmul_tn":
        tall = call.primitive(reshape(x1, shape=(-1, x1.shape[-1])), x2)
    elif call.varies == (False, True) and x1.ndim == 2 and x2.ndim == 3 and shape[1] == 1:
        # Matrix times vector: the vectors are rows of a matrix, the other factor is transposed.
        turned = primitives["matmul" if name == "matmul_tn" else "matmul_nt"]
        tall = turned(reshape(x2, shape=(rows, x2.size // rows)), x1)
    else:
        return _elementwise(call, xs, rows)
    return (reshape(tall, shape=(rows, *shape)),)


def _reshape(call: _Call, xs: list[Any], rows: int) -> _Results:
    return (reshape(xs[0], shape=(rows, *call.shape)),)


def _permute(call: _Call, xs: list[Any], _rows: int) -> _Results:
    return (permute(xs[0], axes=(0, *(axis + 1 for axis in call.params["axes"]))),)


def _broadcast_to(call: _Call, xs: list[Any], rows: int) -> _Results:
    (x,) = _aligned(call, xs)
    return (broadcast_to(x, shape=(rows, *call.shape)),)


def _sum_to(call: _Call, xs: list[Any], rows: int) -> _Results:
    (x,), shape = xs, call.shape
    spread = sum_to(x, shape=(rows, *(1,) * (x.ndim - 1 - len(shape)), *shape))
    return (reshape(spread, shape=(rows, *shape)),)


def _spread(call: _Call, xs: list[Any], rows: int) -> list[Any]:
    """Return inputs of which all have the rows in front."""
    return [
        x if varies else broadcast_to(x, shape=(rows, *x.shape))
        for x, varies in zip(xs, call.varies, strict=True)
    ]


def _along_axes(call: _Call, xs: list[Any], rows: int) -> _Results:
    """Call what has axes, counted from the front, as a setting."""
    axis = call.params["axis"]
    later = tuple(a + 1 for a in axis) if type(axis) is tuple else axis + 1
    return (call.primitive(*_spread(call, xs, rows), **{**call.params, "axis": later}),)


def _of_last_axes(call: _Call, xs: list[Any], _rows: int) -> _Results:
    return (call.primitive(*xs, **call.params),)


def _embed_diagonal(call: _Call, xs: list[Any], rows: int) -> _Results:
    params = {**call.params, "shape": (rows, *call.params["shape"])}
    return (call.primitive(*xs, **params),)


def _linear_relu_grad(call: _Call, xs: list[Any], _rows: int) -> _Results:
    gz = primitives["relu_grad"](*_aligned(call, xs))
    return gz, primitives["sum"](gz, axis=(1,), keepdims=False, dtype=None)


def _einsum(call: _Call, xs: list[Any], _rows: int) -> _Results:
    terms, output = call.params["subscripts"].split("->")
    letter = next((c for c in string.ascii_letters if c not in call.params["subscripts"]), None)
    if letter is None:
        return None
    inputs = [
        letter * varies + term for term, varies in zip(terms.split(","), call.varies, strict=True)
    ]
    return (call.primitive(*xs, subscripts=f"{','.join(inputs)}->{letter}{output}"),)


def _row(call: _Call, xs: list[Any], _rows: int) -> _Results:
    return (primitives["getitem"](xs[0], index=(FULL, call.params["index"])),)


def _place_row(call: _Call, xs: list[Any], rows: int) -> _Results:
    index = (FULL, call.params["index"])
    return (primitives["place"](xs[0], shape=(rows, *call.shape), index=index),)


def _getitem(call: _Call, xs: list[Any], _rows: int) -> _Results:
    index = call.params["index"]
    if SLOT in index and index != (SLOT,):  # arrays that stand apart bring their axes to the front
        return None
    return (call.primitive(*xs, **{**call.params, "index": (FULL, *index)}),)


def _place(call: _Call, xs: list[Any], rows: int) -> _Results:
    index = (FULL, *call.params["index"])
    return (call.primitive(*xs, shape=(rows, *call.params["shape"]), index=index),)


def _scatter_add(call: _Call, xs: list[Any], rows: int) -> _Results:
    values, index = xs
    if call.varies[1]:
        return None
    n, columns = values.shape[1:]
    side_by_side = reshape(permute(values, axes=(1, 0, 2)), shape=(n, rows * columns))
    found = call.primitive(side_by_side, index, **call.params)
    apart = reshape(found, shape=(found.shape[0], rows, columns))
    return (permute(apart, axes=(1, 0, 2)),)


# What an upstream gradient goes through is linear in it: a softmax, say, is not among these.
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("add", "subtract", "multiply", "divide", "negative", "positive"), _elementwise
    ),
    **dict.fromkeys(("scale", "scale_both", "relu_grad", "where", "cast"), _elementwise),
    **dict.fromkeys(("ones_like", "zeros_like", "transfer"), _elementwise),
    **dict.fromkeys(("matmul", "matmul_nt", "matmul_tn"), _product),
    **dict.fromkeys(("sum", "flip", "roll", "shift"), _along_axes),
    **dict.fromkeys(("cumulative_sum", "recurrence"), _along_axes),
    **dict.fromkeys(("tril", "triu", "diagonal"), _of_last_axes),
    "embed_diagonal": _embed_diagonal,
    "reshape": _reshape,
    "permute": _permute,
    "broadcast_to": _broadcast_to,
    "sum_to": _sum_to,
    "linear_relu_grad": _linear_relu_grad,
    "einsum": _einsum,
    "row": _row,
    "place_row": _place_row,
    "getitem": _getitem,
    "place": _place,
    "scatter_add": _scatter_add,
}
