"""Products of vectors, matrices and tensors, and parts of matrices."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad.kernels import gemm
from tapegrad.linear import broadcast_to as _broadcast_to
from tapegrad.linear import permute as _permute
from tapegrad.linear import reshape as _reshape
from tapegrad.ops import elementwise as ew
from tapegrad.ops import reductions
from tapegrad.ops.arguments import as_tensor, normalize_axes, normalize_axis
from tapegrad.ops.shape import moveaxis
from tapegrad.primitive import Primitive, primitive
from tapegrad.tensor import ArrayLike, Tensor


def product(xp: Module, x1: Any, x2: Any) -> Array:
    """Return x1 @ x2 of arrays; for two matrices the method is 0.5 us faster than the ufunc.

    But of one element it makes a factor of the other matrix, and BLAS leaves out the product with a
    factor of 0: NaN and infinities would become 0.
    """
    kind = np.ndarray
    if xp is np and type(x1) is kind and type(x2) is kind and x1.ndim == x2.ndim == 2:
        by_dot = x1.dtype.char in "fd" and x1.size != 1 and x2.size != 1
        if by_dot:
            return x1.dot(x2)
    y = xp.matmul(x1, x2)
    if xp is np and x1.dtype.kind == "V" and x2.dtype == x1.dtype:  # bfloat16: it gives float32
        return y.astype(x1.dtype)
    return y


# Of matrices, or stacks of them that broadcast: the tape sums over what was spread. The other two
# have their second or their first factor transposed: a reverse pass is made of them.
_matmul: Primitive = primitive(
    "matmul",
    product,
    lambda g, _y, _x1, x2: matmul_nt(g, x2),
    lambda g, _y, x1, _x2: matmul_tn(x1, g),
    kernel=gemm.matmul,
    fills=True,
)
matmul_nt: Primitive = primitive(
    "matmul_nt",
    lambda xp, x1, x2: product(xp, x1, x2.swapaxes(-1, -2)),
    lambda g, _y, _x1, x2: _matmul(g, x2),
    lambda g, _y, x1, _x2: matmul_tn(g, x1),
    kernel=lambda xp, x1, x2, **out: gemm.matmul(xp, x1, x2.swapaxes(-1, -2), **out),
    fills=True,
)
matmul_tn: Primitive = primitive(
    "matmul_tn",
    lambda xp, x1, x2: product(xp, x1.swapaxes(-1, -2), x2),
    lambda g, _y, _x1, x2: matmul_nt(x2, g),
    lambda g, _y, x1, _x2: _matmul(x1, g),
    kernel=lambda xp, x1, x2, **out: gemm.matmul(xp, x1.swapaxes(-1, -2), x2, **out),
    fills=True,
)


def matmul(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return the matrix product x1 @ x2, of vectors, matrices, or stacks of matrices.

    The last two axes are multiplied, all before them broadcast. A vector is a row on the left and
    a column on the right, and loses that axis in the result. Raises `ValueError` for lengths that
    do not fit and for 0-d arguments.

    >>> print(tg.matmul([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0]))
    tg.Tensor([3. 7.], shape=(2,), dtype=float32)
    """
    x1, x2 = as_tensor(x1), as_tensor(x2)
    shape1, shape2 = x1.shape, x2.shape
    if not shape1 or not shape2:
        raise ValueError("[matmul] a 0-d tensor has no rows or columns: multiply with *")
    if shape1[-1] != (shape2[-2] if len(shape2) > 1 else shape2[0]):
        raise ValueError(
            f"[matmul] the last axis of x1 must be as long as the one of x2 that it meets, "
            f"got shapes {shape1} and {shape2}"
        )
    if len(shape1) > 1 and len(shape2) > 1:
        return _matmul(x1, x2)
    left = x1 if len(shape1) > 1 else _reshape(x1, shape=(1, *shape1))
    right = x2 if len(shape2) > 1 else _reshape(x2, shape=(*shape2, 1))
    y = _matmul(left, right)
    shape = y.shape[:-2]
    shape += (y.shape[-2],) if len(shape1) > 1 else ()
    shape += (y.shape[-1],) if len(shape2) > 1 else ()
    return _reshape(y, shape=shape)


def dot(x1: ArrayLike, x2: ArrayLike) -> Tensor:
    """Return NumPy's `dot`: of numbers and of stacks of matrices it is not `matmul`."""
    left, right = as_tensor(x1), as_tensor(x2)
    if not left.ndim or not right.ndim:
        return ew.multiply(x1, x2)
    return matmul(left, right) if right.ndim < 3 else tensordot(left, right, axes=([-1], [-2]))


def outer(x1: ArrayLike, x2: ArrayLike, /) -> Tensor:
    """Return the outer product x1[i] * x2[j] of two vectors.

    Raises `ValueError` for anything but vectors.

    >>> print(tg.outer([1.0, 2.0], [3.0, 4.0]))
    tg.Tensor(
    [[3. 4.]
     [6. 8.]], shape=(2, 2), dtype=float32)
    """
    x1, x2 = as_tensor(x1), as_tensor(x2)
    if x1.ndim != 1 or x2.ndim != 1:
        raise ValueError(f"[outer] needs two vectors, got shapes {x1.shape} and {x2.shape}")
    return ew.multiply(_reshape(x1, shape=(*x1.shape, 1)), x2)


def vecdot(x1: ArrayLike, x2: ArrayLike, /, axis: int = -1) -> Tensor:
    """Return the sum of x1 * x2 over an axis, counted from the end, all others broadcast.

    Raises `ValueError` for shapes that do not fit.

    >>> print(tg.vecdot([1.0, 2.0], [3.0, 4.0]))
    tg.Tensor(11.0, shape=(), dtype=float32)
    """
    x1, x2 = as_tensor(x1), as_tensor(x2)
    lengths = [x.shape[normalize_axis("vecdot", axis, x.ndim)] for x in (x1, x2)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"[vecdot] axis {axis} must have one length, got shapes {x1.shape} and {x2.shape}"
        )
    return reductions.sum(ew.multiply(moveaxis(x1, axis, -1), moveaxis(x2, axis, -1)), axis=-1)


def tensordot(
    x1: ArrayLike, x2: ArrayLike, /, *, axes: int | tuple[Sequence[int], Sequence[int]] = 2
) -> Tensor:
    """Return the sum of products over pairs of axes, as NumPy's `tensordot`.

    axes  a number n: the last n axes of x1 with the first n of x2; or two sequences that name
          them. The result has the other axes of x1, then those of x2.

    Raises `ValueError` for axes that differ in number or length.

    >>> tg.tensordot(tg.ones((2, 3, 4)), tg.ones((3, 4, 5))).shape
    (2, 5)
    """
    x1, x2 = as_tensor(x1), as_tensor(x2)
    if isinstance(axes, (int, np.integer)):
        if not 0 <= axes <= min(x1.ndim, x2.ndim):
            raise ValueError(f"[tensordot] cannot sum over {axes} axes of {x1.shape}, {x2.shape}")
        axes = (range(x1.ndim - axes, x1.ndim), range(axes))
    first, second = (list(a) if isinstance(a, (Sequence, range)) else [a] for a in axes)
    over1 = normalize_axes("tensordot", tuple(first), x1.ndim)
    over2 = normalize_axes("tensordot", tuple(second), x2.ndim)
    if [x1.shape[i] for i in over1] != [x2.shape[i] for i in over2]:
        raise ValueError(
            f"[tensordot] axes {over1} of {x1.shape} and {over2} of {x2.shape} have unlike lengths"
        )
    free1 = tuple(i for i in range(x1.ndim) if i not in over1)
    free2 = tuple(i for i in range(x2.ndim) if i not in over2)
    shape1, shape2 = (tuple(x.shape[i] for i in free) for x, free in ((x1, free1), (x2, free2)))
    inner = math.prod(x1.shape[i] for i in over1)
    rows = _reshape(_permute(x1, axes=free1 + over1), shape=(math.prod(shape1), inner))
    columns = _reshape(_permute(x2, axes=over2 + free2), shape=(inner, math.prod(shape2)))
    return _reshape(_matmul(rows, columns), shape=shape1 + shape2)


# ---- einsum


def _einsum_vjp(
    needs: tuple[bool, ...], g: Tensor, _y: Any, *xs: Any, subscripts: str
) -> tuple[Tensor | None, ...]:
    terms, output = subscripts.split("->")
    inputs = terms.split(",")
    answers: list[Tensor | None] = []
    for i, needed in enumerate(needs):
        others = inputs[:i] + inputs[i + 1 :]
        equation = ",".join([output, *others]) + "->" + inputs[i]
        if not needed:
            answers.append(None)
            continue
        answer = _einsum(g, *xs[:i], *xs[i + 1 :], subscripts=equation)
        # Where all others were spread along an axis, each element has the same gradient.
        shape = np.broadcast_shapes(answer.shape, xs[i].shape)
        answers.append(answer if answer.shape == shape else _broadcast_to(answer, shape=shape))
    return tuple(answers)


# Subscripts in which no term repeats a letter, and none has a letter that stands nowhere else:
# then the gradient for a term is an einsum of the same kind.
_einsum: Primitive = primitive(
    "einsum",
    lambda xp, *xs, subscripts: xp.einsum(subscripts, *xs, optimize=len(xs) > 2),
    joint_vjp=_einsum_vjp,
)


def einsum(subscripts: str, /, *operands: ArrayLike) -> Tensor:
    """Return the sum of products that `subscripts` describe, in NumPy's notation.

    Repeated letters in a term, letters that are summed alone, ellipses and a missing output are
    all allowed. Raises `ValueError` for a description that does not fit the operands.

    >>> print(tg.einsum("ij,jk->ik", [[1.0, 2.0]], [[3.0], [4.0]]))
    tg.Tensor([[11.]], shape=(1, 1), dtype=float32)
    """
    xs = [as_tensor(x) for x in operands]
    inputs, output = _explicit_subscripts(subscripts, xs)
    for i, term in enumerate(inputs):
        # A letter twice in a term means a diagonal, one that stands nowhere else a plain sum.
        for letter in sorted(set(term)):
            while term.count(letter) > 1:
                first = term.index(letter)
                second = term.index(letter, first + 1)
                if xs[i].shape[first] != xs[i].shape[second]:
                    raise ValueError(
                        f"[einsum] {letter!r} has two lengths in {term!r}, of shape {xs[i].shape}"
                    )
                xs[i] = diagonal(xs[i], axis1=first, axis2=second)
                term = term[:first] + term[first + 1 : second] + term[second + 1 :] + letter
        elsewhere = set(output).union(*inputs[:i], *inputs[i + 1 :])
        alone = [letter for letter in term if letter not in elsewhere]
        if alone:
            xs[i] = reductions.sum(xs[i], axis=tuple(term.index(letter) for letter in alone))
            term = "".join(letter for letter in term if letter in elsewhere)
        inputs[i] = term
    return _einsum(*xs, subscripts=",".join(inputs) + "->" + output)


def _explicit_subscripts(subscripts: str, xs: list[Tensor]) -> tuple[list[str], str]:
    """Return the terms and the output with the ellipses spelled out in unused letters."""
    text = subscripts.replace(" ", "")
    left, arrow, output = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(xs):
        raise ValueError(f"[einsum] {subscripts!r} describes {len(terms)} operands, got {len(xs)}")
    letters = set(text) & set(string.ascii_letters)
    if set(text.replace("...", "")) - set(string.ascii_letters) - set(",->"):
        raise ValueError(f"[einsum] subscripts are letters, commas, '...' and '->': {subscripts!r}")
    spare = [letter for letter in string.ascii_letters if letter not in letters]
    ranks = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, xs, strict=True)]
    for term, x, rank in zip(terms, xs, ranks, strict=True):
        if rank < 0 or (rank > 0 and "..." not in term):
            raise ValueError(f"[einsum] the term {term!r} does not fit the shape {x.shape}")
    longest = max((rank for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0)
    dots = "".join(spare[:longest])
    terms = [
        term.replace("...", dots[longest - rank :] if "..." in term else "")
        for term, rank in zip(terms, ranks, strict=True)
    ]
    if not arrow:  # NumPy's rule: the letters that stand once, in alphabetical order
        every = "".join(term for term in terms)
        output = dots + "".join(
            sorted(letter for letter in set(every) - set(dots) if every.count(letter) == 1)
        )
    output = output.replace("...", dots)
    if len(set(output)) != len(output) or set(output) - set("".join(terms)):
        raise ValueError(
            f"[einsum] the output of {subscripts!r} must name letters of the operands, each once"
        )
    return terms, output


# ---- parts of matrices


def _embed_forward(xp: Module, x: Array, *, shape: tuple[int, ...], offset: int) -> Array:
    y = xp.zeros(shape, x.dtype)
    i = xp.arange(x.shape[-1])
    y[..., i + (-offset if offset < 0 else 0), i + (offset if offset > 0 else 0)] = x
    return y


# Of the last two axes; and back, among zeros.
_diagonal: Primitive = primitive(
    "diagonal",
    lambda xp, x, *, offset: xp.diagonal(x, offset, -2, -1).copy(),
    lambda g, _y, _x, *, offset: _embed_diagonal(g, shape=_x.shape, offset=offset),
)
_embed_diagonal: Primitive = primitive(
    "embed_diagonal",
    _embed_forward,
    lambda g, _y, _x, *, shape, offset: _diagonal(g, offset=offset),
)
_tril: Primitive = primitive(
    "tril", lambda xp, x, *, k: xp.tril(x, k), lambda g, _y, _x, *, k: _tril(g, k=k)
)
_triu: Primitive = primitive(
    "triu", lambda xp, x, *, k: xp.triu(x, k), lambda g, _y, _x, *, k: _triu(g, k=k)
)


def diagonal(x: ArrayLike, /, *, offset: int = 0, axis1: int = -2, axis2: int = -1) -> Tensor:
    """Return the diagonal of the matrices in two axes, as the last axis of the result.

    offset  above (> 0) or below (< 0) the main one. Raises `ValueError` for less than two axes.

    >>> print(tg.diagonal([[1.0, 2.0], [3.0, 4.0]]))
    tg.Tensor([1. 4.], shape=(2,), dtype=float32)
    """
    x = as_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"[diagonal] x must have at least two axes, got shape {x.shape}")
    first = normalize_axis("diagonal", axis1, x.ndim)
    second = normalize_axis("diagonal", axis2, x.ndim)
    if first == second:
        raise ValueError(f"[diagonal] axis1 and axis2 are both {first}")
    if (first, second) != (x.ndim - 2, x.ndim - 1):
        x = moveaxis(x, (first, second), (-2, -1))
    return _diagonal(x, offset=offset)


def trace(x: ArrayLike, /, *, offset: int = 0) -> Tensor:
    """Return the sum of the diagonal of the matrices in the last two axes.

    Raises `ValueError` for less than two axes.

    >>> print(tg.trace([[1.0, 2.0], [3.0, 4.0]]))
    tg.Tensor(5.0, shape=(), dtype=float32)
    """
    return reductions.sum(diagonal(x, offset=offset), axis=-1)


def tril(x: ArrayLike, /, *, k: int = 0) -> Tensor:
    """Return the matrices of the last two axes with zeros above the k-th diagonal.

    Raises `ValueError` for less than two axes.

    >>> print(tg.tril([[1.0, 2.0], [3.0, 4.0]]))
    tg.Tensor(
    [[1. 0.]
     [3. 4.]], shape=(2, 2), dtype=float32)
    """
    return _tril(_matrices("tril", x), k=k)


def triu(x: ArrayLike, /, *, k: int = 0) -> Tensor:
    """Return the matrices of the last two axes with zeros below the k-th diagonal.

    Raises `ValueError` for less than two axes.

    >>> print(tg.triu([[1.0, 2.0], [3.0, 4.0]]))
    tg.Tensor(
    [[1. 2.]
     [0. 4.]], shape=(2, 2), dtype=float32)
    """
    return _triu(_matrices("triu", x), k=k)


def _matrices(name: str, x: ArrayLike) -> Tensor:
    x = as_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"[{name}] x must have at least two axes, got shape {x.shape}")
    return x
