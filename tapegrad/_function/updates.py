"""Updates: on a GPU, weights that the product of their gradient updates where they lie.

Plain SGD is p = p - rate * x.T @ g, and the velocity of momentum v = mu * v - rate * x.T @ g: a
product that is added to what lies in memory, which cuBLASLt does in one launch. The gradient is
then neither written nor read. It is done for weights whose gradient nobody else needs (no clipping,
no decay, no caller), where timing on the device says that it pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._function.gradients import gathering_for
from tapegrad._function.program import Program, Step, Value, makers_of
from tapegrad._function.rewrites import Rewrite
from tapegrad.kernels import gemm_update as kernels
from tapegrad.primitive import Primitive, Update
from tapegrad.tensor import wrap
from tapegrad.variable import Variable, assign_add, over_memory


def _add_product(xp: Module, c: Array, x: Array, w: Array, alpha: Array, beta: Array) -> None:
    c *= beta
    c += alpha * xp.matmul(x, w)


# c = beta * c + alpha * x @ w. The scale is a number of c's type: what the hyper-parameters, of
# float64, are made for it.
add_product = Update("add_product", _add_product, writes=1, kernel=kernels.add_product)
_scale_of = Primitive("scale_of", lambda xp, x, *, by, dtype: xp.multiply(x, by, dtype=dtype), None)

_RULES = {"sgd": kernels.SGD, "momentum": kernels.MOMENTUM}


def _update_in_products(program: Program) -> None:
    """Let products update the weights whose gradients they are."""
    if program.on_host:
        return
    uses, made_by = program.uses(), makers_of(program.steps)
    instead: dict[Step, list[Step]] = {}
    for update in program.steps:
        if update.name not in _RULES or update.params.get("nesterov"):
            continue
        gather = gathering_for(program, update)
        if gather is None:
            continue
        products: dict[int, Step] = {}  # by the gradient's number
        for i, x in enumerate(gather.inputs):
            product = made_by.get(x)
            if product is not None and uses[x] == 1 and _can_update(product, update):
                products[i] = product
        if products:
            instead.update(_rewritten(gather, update, products))
    if instead:
        program.steps = [new for step in program.steps for new in instead.get(step, [step])]


def _can_update(product: Step, update: Step) -> bool:
    """Tell whether a product of matrices updates a weight faster than the update does."""
    if product.name != "matmul" or product.outputs[0].dtype.char not in "fd":
        return False
    x, w = product.inputs
    if len(x.shape) != 2 or len(w.shape) != 2 or not x.dtype == w.dtype == update.writes[0].dtype:
        return False
    (rows, batch), columns = x.shape, w.shape[1]
    if 0 in (rows, batch, columns):
        return False
    xp = _backend.module_of([update.writes[0]._array])
    return kernels.pays(_RULES[update.name], batch, rows, columns, x.dtype, xp)


def _rewritten(gather: Step, update: Step, products: dict[int, Step]) -> dict[Step, list[Step]]:
    """Return what comes in the places of some products, of the gathering and of the update."""
    gradients, rate, *rest = update.inputs
    xp = _backend.module_of([update.writes[0]._array])
    dtype = update.writes[0].dtype
    scales = [_scale(update, rate, -1.0, dtype)]
    if rest:
        scales.append(_scale(update, rest[0], 1.0, dtype))
    alpha, beta = [step.outputs[0] for step in scales] if rest else (
        scales[0].outputs[0],
        Value("constant", (), dtype, wrap(xp.ones((), dtype))),
    )  # fmt: skip
    target = update.writes[-1]  # the weights, or their velocities
    gathers: list[Step] = []
    updates: list[Step] = []
    for members in _stretches(gather, products):
        fused = members[0] in products
        start, end = _bounds(gather, members)
        parts = [_part(v, start, end) for v in update.writes]
        if not fused:
            places = tuple([gather.params["places"][i] - start for i in members])
            flat = _part(gather.writes[0], start, end)
            inputs = [gather.inputs[i] for i in members]
            params = {"places": places}
            gathers.append(gather.instead(gather.primitive, inputs, (), params, [flat]))
            read = Value("read", flat.shape, flat.dtype, flat, gradients.since)
            inputs = [read, rate, *rest]
            updates.append(update.instead(update.primitive, inputs, (), update.params, parts))
            continue
        for i in members:
            place, shape = gather.params["places"][i], gather.inputs[i].shape
            weight = _part(target, place, place + gather.inputs[i].size, shape)
            inputs = [*products[i].inputs, alpha, beta]
            updates.append(update.instead(add_product, inputs, writes=[weight]))
        if rest:  # p += v, of all weights of the stretch
            velocity = parts[-1]
            since = update.order + 1
            read = Value("read", velocity.shape, velocity.dtype, velocity, since)
            updates.append(update.instead(assign_add, (read,), writes=parts[:1]))
    return {
        **{product: [] for product in products.values()},
        gather: [*scales, *gathers],
        update: updates,
    }


def _scale(update: Step, number: Value, by: float, dtype: np.dtype[Any]) -> Step:
    made = Value("result", (), dtype)
    return update.instead(_scale_of, (number,), (made,), {"by": by, "dtype": dtype})


def _stretches(gather: Step, products: dict[int, Step]) -> list[list[int]]:
    """Return the numbers of the gradients: neighbours that products take, or that they do not."""
    found: list[list[int]] = []
    for i in range(len(gather.inputs)):
        if found and (found[-1][-1] in products) == (i in products):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _bounds(gather: Step, members: Sequence[int]) -> tuple[int, int]:
    """Return where neighbours begin in the flat buffer, and where they end."""
    places = gather.params["places"]
    last = members[-1]
    if last + 1 == len(places):
        return places[members[0]], gather.writes[0].size
    return places[members[0]], places[last] + gather.inputs[last].size


def _part(flat: Variable, start: int, end: int, shape: tuple[int, ...] = (-1,)) -> Variable:
    return over_memory(flat._buffer, flat._array[start:end].reshape(shape))


REWRITES = {
    "updates": Rewrite(
        _update_in_products,
        "on a GPU the roundings of a gradient and of the product with the learning rate",
    )
}
