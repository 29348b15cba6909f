"""Row-major products as column-major problems: by hand, and by an emulation of cuBLASLt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cublaslt_emulation import Matrix as Memory
from cublaslt_emulation import multiply

from tapegrad.kernels import gemm_plan
from tapegrad.kernels.gemm_plan import Matrix, Problem


def array(*shape):
    """Small integers: every sum of products is exact."""
    return np.random.default_rng(sum(shape)).integers(-4, 5, shape).astype("f4")


def plan(x, w):
    return gemm_plan.problem(x.shape, x.strides, w.shape, w.strides, x.itemsize)


X, W = array(3, 4), array(4, 5)
D = Matrix(5, 3, 5)  # y is (3, 5)
# name: x, w, the problem worked out by hand: A is w, B is x, seen column by column
BY_HAND = {
    "plain": (X, W, Problem(Matrix(5, 4, 5), False, Matrix(4, 3, 4), False, D, 1)),
    "w.T": (X, array(5, 4).T, Problem(Matrix(4, 5, 4), True, Matrix(4, 3, 4), False, D, 1)),
    "x.T": (array(4, 3).T, W, Problem(Matrix(5, 4, 5), False, Matrix(3, 4, 3), True, D, 1)),
    "part of wider rows": (
        array(3, 9)[:, 2:6],
        array(4, 7)[:, :5],
        Problem(Matrix(5, 4, 7), False, Matrix(4, 3, 9), False, D, 1),
    ),
    "every other row": (
        array(6, 4)[::2],
        array(5, 8).T[::2],  # neither rows nor columns are packed: see the copies below
        None,
    ),
    "one row of every other column": (
        array(1, 8)[:, ::2],
        W,
        Problem(Matrix(5, 4, 5), False, Matrix(1, 4, 2), True, Matrix(5, 1, 5), 1),
    ),
    "one column, a part of w": (
        X,
        W[:, 2:3],
        Problem(Matrix(1, 4, 5), False, Matrix(4, 3, 4), False, Matrix(1, 3, 1), 1),
    ),
    "one number": (
        X[:1, :1],
        W[:1, :1],
        Problem(Matrix(1, 1, 1), False, Matrix(1, 1, 1), False, Matrix(1, 1, 1), 1),
    ),
    "a stack and a matrix are one tall matrix": (
        array(2, 6, 3, 4),
        W,
        Problem(Matrix(5, 4, 5), False, Matrix(4, 36, 4), False, Matrix(5, 36, 5), 1),
    ),
    "a stack with gaps": (
        array(2, 5, 4)[:, :3],
        W,
        Problem(Matrix(5, 4, 5), False, Matrix(4, 3, 4, 20), False, Matrix(5, 3, 5, 15), 2),
    ),
    "two stacks": (
        array(2, 3, 4),
        array(2, 4, 5),
        Problem(Matrix(5, 4, 5, 20), False, Matrix(4, 3, 4, 12), False, Matrix(5, 3, 5, 15), 2),
    ),
    "a matrix and a stack": (
        X,
        array(2, 4, 5),
        Problem(Matrix(5, 4, 5, 20), False, Matrix(4, 3, 4), False, Matrix(5, 3, 5, 15), 2),
    ),
    "stacks of transposes": (
        array(2, 4, 3).swapaxes(1, 2),
        array(2, 5, 4).swapaxes(1, 2),
        Problem(Matrix(4, 5, 4, 20), True, Matrix(3, 4, 3, 12), True, Matrix(5, 3, 5, 15), 2),
    ),
    "a stack of one": (
        array(1, 3, 4),
        W,
        Problem(Matrix(5, 4, 5), False, Matrix(4, 3, 4), False, D, 1),
    ),
    "unevenly spaced": (array(2, 5, 3, 4)[:, :2], array(2, 2, 4, 5), None),
    "broadcast along one of two axes": (array(2, 1, 3, 4), array(2, 2, 4, 5), None),
    "a stack backwards": (array(2, 3, 4)[::-1], array(2, 4, 5), None),
    "lengths do not fit": (X, X, None),
    "stacks do not fit": (array(2, 3, 4), array(3, 4, 5), None),
    "no rows": (X[:0], W, None),
    "nothing to sum": (X[:, :0], W[:0], None),
    "a vector": (X[0], W, None),
    "backwards": (X[::-1], W, None),
    "broadcast rows": (np.broadcast_to(X[0], (3, 4)), W, None),
    "overlapping rows": (np.lib.stride_tricks.sliding_window_view(X[0], 2), array(2, 5), None),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    x, w, want = BY_HAND[name]
    assert plan(x, w) == want


def emulated(problem, x, w, shape):
    """Do what cuBLASLt would do for a problem: with addresses, not arrays."""
    y = np.full(shape, np.nan, x.dtype)
    a, b, d = (
        Memory(array.ctypes.data, x.dtype, m.rows, m.columns, m.leading, problem.batch, m.stride)
        for array, m in ((w, problem.a), (x, problem.b), (y, problem.d))
    )
    assert all(m.leading >= m.rows for m in (a, b, d))
    multiply(a, problem.transpose_a, b, problem.transpose_b, d)
    return y


# How a matrix of a given shape lies in memory, or each of a stack.
LAYOUTS = {
    "rows": lambda *shape: array(*shape),
    "columns": lambda *shape: array(*shape[:-2], shape[-1], shape[-2]).swapaxes(-1, -2),
    "part of wider rows": lambda *shape: array(*shape[:-1], shape[-1] + 3)[..., 1:-2],
    "part of longer columns": lambda *shape: array(*shape[:-2], shape[-1], shape[-2] + 3).swapaxes(
        -1, -2
    )[..., 2:-1, :],
    "every other row": lambda *shape: array(*shape[:-2], 2 * shape[-2], shape[-1])[..., ::2, :],
}


# What stands before the last two axes of x and w.
STACKS = [
    *[((), ()), ((3,), ()), ((2, 3), ()), ((), (3,)), ((2, 3), (2, 3))],
    *[((1, 3), (3,)), ((3, 1), (3, 1)), ((1,), (3,)), ((3,), (1,))],
]


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids=" x ".join)
def test_against_an_emulation(layouts):
    make_x, make_w = (LAYOUTS[name] for name in layouts)
    lengths = (1, 2, 5, 8)
    for n, k, m in itertools.product(lengths, repeat=3):
        for x_stack, w_stack in STACKS:
            x, w = make_x(*x_stack, n, k), make_w(*w_stack, k, m)
            problem = plan(x, w)
            assert problem is not None, (x.shape, x.strides, w.shape, w.strides)
            want = x @ w
            np.testing.assert_array_equal(emulated(problem, x, w, want.shape), want)


def test_what_must_be_copied():
    for x, readable in [
        (X, True), (X.T, True), (X[:, ::2], False), (X[::-1], False), (X[:, ::-1], False),
        (np.broadcast_to(X[0], (3, 4)), False), (np.broadcast_to(X[:, :1], (3, 4)), False),
        (X[:1, ::2], True), (X[::2, :1], True), (array(2, 3, 4)[:, :, ::2], False),
        (array(2, 3, 4)[::-1], True),
    ]:  # fmt: skip
        assert gemm_plan.is_matrix(x.shape, x.strides, 4) is readable, (x.shape, x.strides)
    packed = np.zeros(3, [("value", "f4"), ("flag", "i1")])["value"][None]
    assert packed.strides[-1] == 5
    assert not gemm_plan.is_matrix(packed.shape, packed.strides, 4)
    # One element is contiguous whatever its strides: a copy would be the array itself.
    one = packed[:, :1]
    assert one.flags.c_contiguous
    assert gemm_plan.is_matrix(one.shape, one.strides, 4)
    assert plan(one, one) == Problem(
        *(Matrix(1, 1, 1), False, Matrix(1, 1, 1), False, Matrix(1, 1, 1), 1)
    )


def test_alignment():
    wanted = {2: 2, 4: 4, 6: 2, 24: 8, 48: 16, 256: 16, 0: 16}
    assert {address: gemm_plan.alignment(address) for address in wanted} == wanted
