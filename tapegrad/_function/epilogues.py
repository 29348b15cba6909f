"""Epilogues: steps of a training program on a GPU that one product computes on its way.

The primitives here span two operations that a tape records, and only rewrites put them into
programs. Their kernels take an epilogue of cuBLASLt's where it is the faster way; where it is not
they launch what the two operations would. So a rewrite decides nothing but what may be one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._function.program import Program, Step, Value, makers_of, users_of
from tapegrad._function.rewrites import Rewrite
from tapegrad.fused import linear_relu, linear_relu_grad, of_matrix_and_sums, relu_grad
from tapegrad.kernels import epilogues as kernels
from tapegrad.kernels import gemm_plan
from tapegrad.linear import sum_to
from tapegrad.ops.linear_algebra import matmul_nt, matmul_tn
from tapegrad.ops.linear_algebra import product as matrix_product
from tapegrad.primitive import MultiPrimitive, multi_primitive
from tapegrad.tensor import Tensor

_Two = tuple[Tensor | None, Tensor | None]


class _Uses:
    """Which steps make and use the values of a program."""

    def __init__(self, program: Program) -> None:
        self._outputs = set(program.output_values())
        self._maker = makers_of(program.steps)
        self._users = users_of(program.steps)

    def maker(self, x: Value, name: str) -> Step | None:
        """Return the step that makes a value, if it is of such a primitive."""
        step = self._maker.get(x)
        return step if step is not None and step.name == name else None

    def of(self, x: Value) -> list[Step]:
        """Return the steps that use a value."""
        return self._users.get(x, [])

    def only_by(self, step: Step, x: Value) -> bool:
        """Tell whether one step alone needs a value."""
        return x not in self._outputs and self.of(x) == [step]


def _replace(program: Program, instead: dict[Step, Step | None]) -> None:
    """Put other steps into a program in the places of some, or none."""
    made = [instead.get(step, step) for step in program.steps]
    program.steps = [step for step in made if step is not None]


# ---- a ReLU's mask: layers x (n, i), w (i, o), b (o,); above them g (n, k) and weights (k, o)


def _with_mask(xp: Module, x: Array, w: Array, b: Array, *, above: int) -> tuple[Array, Array]:
    return linear_relu.forward(xp, x, w, b), xp.empty((0,), np.uint8)


def _with_mask_vjp(
    needs: tuple[bool, ...], g: _Two, y: tuple[Tensor, Tensor], x: Tensor, w: Tensor, _b: Any,
    *, above: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    if g[0] is None:
        return None, None, None
    assert linear_relu.joint_vjp is not None
    found: tuple[Tensor | None, ...] = linear_relu.joint_vjp(needs, g[0], y[0], x, w, _b)
    return found


# linear_relu, and what tells the step below where it let values pass: bits in an order of
# cuBLASLt's own, or no bytes at all where looking at the output is the faster way.
linear_relu_with_mask: MultiPrimitive = multi_primitive(
    "linear_relu_with_mask",
    _with_mask,
    joint_vjp=_with_mask_vjp,
    kernel=kernels.linear_relu_with_mask,
)


def _grad_of_product(xp: Module, g: Array, w: Array, y: Array, mask: Array) -> tuple[Array, Array]:
    found: tuple[Array, Array] = linear_relu_grad.forward(xp, matrix_product(xp, g, w), y)
    return found


def _grad_of_product_vjp(
    needs: tuple[bool, ...], G: _Two, _out: Any, g: Tensor, w: Tensor, y: Tensor, _mask: Any
) -> tuple[Tensor | None, ...]:
    total = of_matrix_and_sums(*G, y.shape)
    if total is None:
        return None, None, None, None
    passed = relu_grad(total, y)
    return (
        matmul_nt(passed, w) if needs[0] else None,
        matmul_tn(g, passed) if needs[1] else None,
        None,
        None,
    )


# linear_relu_grad of a product, which is the gradient for the layer's output y: of the layer's
# sum, and of its bias.
matmul_linear_relu_grad: MultiPrimitive = multi_primitive(
    "matmul_linear_relu_grad",
    _grad_of_product,
    joint_vjp=_grad_of_product_vjp,
    kernel=kernels.matmul_linear_relu_grad,
    fills=True,
)


def _mask_relus(program: Program) -> None:
    """Let each ReLU leave a mask for the one product whose gradient goes through it."""
    if program.on_host:
        return
    uses = _Uses(program)
    instead: dict[Step, Step | None] = {}
    for step in program.steps:
        if step.name != "linear_relu_grad":
            continue
        g, y = step.values()
        product, layer = uses.maker(g, "matmul"), uses.maker(y, "linear_relu")
        if product is None or layer is None or not uses.only_by(step, g):
            continue
        if len(y.shape) != 2 or sum(user.name == step.name for user in uses.of(y)) > 1:
            continue
        mask = Value("result", gemm_plan.mask_shape(*y.shape), np.dtype(np.uint8))
        params = {"above": product.inputs[0].shape[1]}
        instead[layer] = layer.instead(linear_relu_with_mask, layer.inputs, (y, mask), params)
        instead[product] = None
        inputs = (*product.inputs, y, mask)
        instead[step] = step.instead(matmul_linear_relu_grad, inputs, step.outputs)
    _replace(program, instead)


# ---- a product and the sums of its second factor's columns: x (n, k), w (k, o)


def _with_sums_vjp(
    needs: tuple[bool, ...], G: _Two, _out: Any, x: Tensor, w: Tensor
) -> tuple[Tensor | None, ...]:
    of_product, of_sums = G
    of_x = of_w = None
    if of_product is not None:
        of_x = matmul_nt(of_product, w) if needs[0] else None
        of_w = matmul_tn(x, of_product) if needs[1] else None
    return of_x, of_matrix_and_sums(of_w, of_sums, w.shape)


# A kernel's gradient and its bias's: the activations, transposed, and the gradient of their layer.
matmul_with_sums: MultiPrimitive = multi_primitive(
    "matmul_with_sums",
    lambda xp, x, w: (matrix_product(xp, x, w), sum_to.forward(xp, w, shape=w.shape[1:])),
    joint_vjp=_with_sums_vjp,
    kernel=kernels.matmul_with_sums,
    fills=True,
)


def _sum_beside_products(program: Program) -> None:
    """Let a product sum the columns of its second factor, where a step of its own does.

    A chain that makes the factor sums it for nothing: so this comes after the chains.
    """
    if program.on_host:
        return
    uses = _Uses(program)
    position = {step: i for i, step in enumerate(program.steps)}
    instead: dict[Step, Step | None] = {}
    for step in program.steps:
        if step.name != "sum_to":
            continue
        (x,) = step.values()
        if len(x.shape) != 2 or step.params["shape"] != x.shape[1:]:
            continue
        for product in uses.of(x):
            if product.name != "matmul" or product in instead or product.inputs[1] is not x:
                continue
            first, last = sorted((step, product), key=position.__getitem__)
            if any(position[user] < position[last] for y in first.outputs for user in uses.of(y)):
                continue
            instead[first] = None
            outputs = (*product.outputs, *step.outputs)
            instead[last] = last.instead(matmul_with_sums, product.inputs, outputs)
            break
    _replace(program, instead)


REWRITES = {
    "relu masks": Rewrite(
        _mask_relus,
        "on a GPU the order of a bias gradient's sum, and the roundings to 16 bits before it",
    ),
    "sums beside products": Rewrite(_sum_beside_products, "on a GPU the order of the sums"),
}
