"""Straight-line NumPy by hand: the bar. Frozen: it changes only if it computes something wrong.

What a person writes who knows the net in advance and counts every call:

- a layer's bias lies under its kernel in one matrix, and activations carry a row of ones, so that
  adding the bias and its gradient are rows of products that are computed anyway;
- activations are stored (features + 1, batch): softmax then runs along contiguous rows, and the
  ones are one contiguous row;
- all parameters lie in one array, and the optimiser is one pass over it;
- every result has its place beforehand (`out=`), no call is made that could be left out, and the
  first layer's input gradient is never computed;
- long arrays are worked on in blocks that stay in cache, over threads.

Costs that decided it, for arrays of about 1,000 elements: a call of equal shapes 0.2-0.3 us, one
that spreads a row over ten 0.8, a reduction 0.8, a product with a matrix of ones instead 0.35;
`np.sign` of floats 0.6, of their bits as integers 0.25.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.peers.base import Peer, Prepared, Training, Unsupported
from benchmarks.problems import Array, Labels, Net

BLOCK = 1 << 16  # elements: smaller ones pay for handing work over, larger ones leave the cache
THREADED = 1 << 19  # elements from which two threads beat one
THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)

_pool = ThreadPoolExecutor(max(1, THREADS - 1))


def scalar(value: float) -> Array:
    """Return a 0-d float32 array: NumPy takes it twice as fast as a Python number."""
    return np.array(value, np.float32)


class Blocks:
    """Calls of work(slice, thread) that cover 0 .. size, over threads where `elements` are many."""

    def __init__(
        self, size: int, work: Callable[[slice, int], Any], block: int, elements: int
    ) -> None:
        self._work = work
        threads = THREADS if elements >= THREADED else 1
        cuts = [slice(i, min(i + block, size)) for i in range(0, size, block)]
        share = -(-len(cuts) // threads)
        self._parts = [cuts[i : i + share] for i in range(0, len(cuts), share)]

    def _part(self, thread: int) -> None:
        for s in self._parts[thread]:
            self._work(s, thread)

    def __call__(self) -> None:
        """Do the work; the calling thread takes the first part."""
        others = [_pool.submit(self._part, i) for i in range(1, len(self._parts))]
        self._part(0)
        for other in others:
            other.result()


class Adam:
    """Adam over a flat array, for gradients that are too large by a factor (the batch).

    m and v are kept without their factors 1 - beta. These, the bias correction and the gradient's
    factor go into two numbers a step: p -= rate * m / (sqrt(v) + epsilon).
    """

    def __init__(self, p: Array, factor: float, learning_rate: float) -> None:
        self.gradient = np.zeros((2, p.size), np.float32)  # g, and g * g: one call adds both
        self._p = p
        self._state = np.zeros((2, p.size), np.float32)  # m, v
        self._factor, self._learning_rate, self._t = factor, learning_rate, 0
        self._rate, self._epsilon = scalar(0), scalar(0)
        self._keep = scalar(0.9), scalar(0.999)
        self._scratch = np.empty((THREADS, min(p.size, BLOCK)), np.float32)
        self._blocks = Blocks(p.size, self._update, BLOCK, p.size)
        self._views = self._part(slice(0, p.size), 0) if p.size <= BLOCK else None

    def _part(self, s: slice, thread: int) -> tuple[Array, ...]:
        p, state, gradient = self._p[s], self._state[:, s], self.gradient[:, s]
        return p, state, *state, gradient, *gradient, self._scratch[thread, : p.size]

    def _update(self, s: slice, thread: int) -> None:
        self._calls(*self._part(s, thread))

    def _calls(
        self, p: Array, mv: Array, m: Array, v: Array, ggg: Array, g: Array, gg: Array, t: Array
    ) -> None:
        keep_m, keep_v = self._keep
        np.multiply(g, g, gg)
        np.multiply(m, keep_m, m)
        np.multiply(v, keep_v, v)
        np.add(mv, ggg, mv)
        np.sqrt(v, t)
        np.add(t, self._epsilon, t)
        np.divide(m, t, t)
        np.multiply(t, self._rate, t)
        np.subtract(p, t, p)

    def __call__(self) -> None:
        """Take one step with the gradient that lies in gradient[0]."""
        self._t = t = self._t + 1
        unbias = math.sqrt((1 - 0.999) / (1 - 0.999**t))
        self._rate[()] = self._learning_rate * (1 - 0.9) / (1 - 0.9**t) / unbias
        self._epsilon[()] = 1e-8 * self._factor / unbias
        if self._views is None:
            self._blocks()
        else:
            self._calls(*self._views)


class SGD:
    """Gradient descent over a flat array, for gradients that hold the learning rate already."""

    def __init__(self, p: Array) -> None:
        self.gradient = np.zeros((1, p.size), np.float32)
        self._p = p
        self._blocks = Blocks(p.size, self._update, BLOCK, p.size)

    def _update(self, s: slice, _thread: int) -> None:
        p = self._p[s]
        np.subtract(p, self.gradient[0, s], p)

    def __call__(self) -> None:
        """Take one step with the gradient that lies in gradient[0]."""
        self._blocks()


def training(net: Net) -> Training:
    """Return a step and a prediction; every array they use is made here."""
    batch, widths, classes = net.batch, net.widths, net.widths[-1]
    p = np.empty(net.parameters, np.float32)
    # Adam does not mind a gradient that is `batch` times too large, but for its epsilon; for SGD,
    # the learning rate goes into the gradient of the logits, so that the update only subtracts.
    adam = net.optimizer == "adam"
    update = Adam(p, batch, net.learning_rate) if adam else SGD(p)
    scale = None if adam else scalar(net.learning_rate / batch)

    matrices, gradients = [], []  # (inputs + 1, outputs), of each layer
    end = 0
    for kernel, bias in net.weights():
        start, end = end, end + kernel.size + bias.size
        matrix = p[start:end].reshape(-1, bias.size)
        matrix[:-1], matrix[-1] = kernel, bias
        matrices.append(matrix)
        gradients.append(update.gradient[0, start:end].reshape(matrix.shape))

    # The input comes (batch, features): it is copied beside a column of ones, not transposed.
    first = np.ones((batch, widths[0] + 1), np.float32)
    pixels = first[:, :-1]
    full = [first.T, *(np.ones((width + 1, batch), np.float32) for width in widths[1:-1])]
    hidden = [a[:-1] for a in full[1:]]
    # Gradients of hidden layers: two places, used in turn.
    places = np.empty((2, max(widths[1:-1], default=0) * batch), np.float32)
    deltas = [places[i % 2, : a.size].reshape(a.shape) for i, a in enumerate(hidden)]

    logits, shifted, e, total, one_hot = np.empty((5, classes, batch), np.float32)
    top = np.empty((1, batch), np.float32)
    log_total = np.empty(batch, np.float32)
    top_row, any_total = top[0], total[0]
    column, square = np.ones((classes, 1), np.float32), np.ones((classes, classes), np.float32)
    ones = np.ones(batch, np.float32)
    flat_one_hot, flat_shifted = one_hot.reshape(-1), shifted.reshape(-1)
    pick = np.eye(classes, dtype=np.float32).take

    forward = [
        (matrix.T, a, z, _relu(z)) for matrix, a, z in zip(matrices, full, hidden, strict=False)
    ]
    last = matrices[-1].T, full[-1], logits
    backward = []
    g = e
    for i in range(len(hidden), 0, -1):
        delta = deltas[i - 1]
        products = full[i], g.T, gradients[i], matrices[i][:-1], g
        backward.append((*products, delta, _mask(delta, hidden[i - 1])))
        g = delta
    final = full[0], g.T, gradients[0]

    dot, subtract, exp, divide, log = np.dot, np.subtract, np.exp, np.divide, np.log
    copyto, multiply, largest = np.copyto, np.multiply, np.maximum.reduce

    def step(x: Array, labels: Labels) -> float:
        copyto(pixels, x)
        for wt, a, z, relu in forward:
            dot(wt, a, z)
            relu()
        dot(*last)
        largest(logits, 0, None, top_row)
        dot(column, top, total)
        subtract(logits, total, shifted)
        exp(shifted, e)
        dot(square, e, total)  # the sum over classes, in every row
        divide(e, total, e)
        pick(labels, 1, one_hot, "clip")
        subtract(e, one_hot, e)
        log(any_total, log_total)
        loss = (dot(log_total, ones) - dot(flat_one_hot, flat_shifted)) / batch
        if scale is not None:
            multiply(e, scale, e)
        for a, gt, dw, w, g, delta, mask in backward:
            dot(a, gt, dw)
            dot(w, g, delta)
            mask()
        dot(*final)
        update()
        return loss

    def predict(x: Array) -> Array:
        for matrix in matrices[:-1]:
            x = np.maximum(x @ matrix[:-1] + matrix[-1], 0)
        return x @ matrices[-1][:-1] + matrices[-1][-1]

    return step, predict


def _relu(z: Array) -> Callable[[], Any]:
    """Return a function that sets what is below 0 to 0, in place."""
    flat = z.reshape(-1)
    zeros = np.zeros(z.shape if z.size < THREADED else BLOCK, np.float32)
    maximum = np.maximum
    if z.size < THREADED:
        return lambda: maximum(z, zeros, out=z)

    def work(s: slice, _thread: int) -> None:
        part = flat[s]
        maximum(part, zeros[: part.size], out=part)

    return Blocks(z.size, work, BLOCK, z.size)


def _mask(g: Array, y: Array) -> Callable[[], Any]:
    """Return a function that sets g to 0 where the activation y (at least 0) is 0, in place.

    On the bits as integers: the sign of y's is 0 or 1, and g's times that are g's or those of 0.
    """
    bits, active = (a.reshape(-1).view(np.int32) for a in (g, y))
    sign, multiply = np.sign, np.multiply
    scratch = np.empty((THREADS, BLOCK) if g.size >= THREADED else (1, g.size), np.int32)
    if g.size < THREADED:
        mask = scratch[0]

        def whole() -> None:
            sign(active, mask)
            multiply(bits, mask, bits)

        return whole

    def work(s: slice, thread: int) -> None:
        part, mask = bits[s], scratch[thread, : s.stop - s.start]
        sign(active[s], mask)
        multiply(part, mask, part)

    return Blocks(g.size, work, BLOCK, g.size)


class NumPyByHand(Peer):
    """The bar that tapegrad is measured by on a CPU."""

    packages = ("numpy",)

    def mlp(self, net: Net) -> Training:
        """Return the functions above."""
        return training(net)

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the blocked update."""
        p = np.array(parameters)
        update = Adam(p, 1, rate)
        update.gradient[0] = gradient

        def run() -> Any:
            update()
            return p

        return run

    def softmax_cross_entropy(self, rows: int, classes: int) -> Prepared:
        """Rows in blocks that stay in cache, over threads; results in arrays of their own."""
        rng = np.random.default_rng(4)
        logits = rng.standard_normal((rows, classes), np.float32)
        labels = rng.integers(0, classes, rows)
        gradient, losses = np.empty_like(logits), np.empty(rows, np.float32)
        picked = np.empty(rows, np.float32)
        flat, flat_gradient = logits.reshape(-1), gradient.reshape(-1)
        places = np.arange(rows) * classes + labels
        summing, part_of_mean = np.ones(classes, np.float32), scalar(1 / rows)

        def work(s: slice, _thread: int) -> None:
            z, e, loss, where = logits[s], gradient[s], losses[s], places[s]
            top = np.maximum.reduce(z, 1)
            np.subtract(z, top[:, None], e)
            np.exp(e, e)
            np.dot(e, summing, loss)
            np.multiply(e, (part_of_mean / loss)[:, None], e)
            np.log(loss, loss)
            np.add(loss, top, loss)
            np.take(flat, where, out=picked[s], mode="clip")
            flat_gradient[where] -= part_of_mean

        block = max(1, BLOCK // classes)
        blocks = Blocks(rows, work, block, logits.size)

        def run() -> Any:
            blocks()
            return (np.add.reduce(losses) - np.add.reduce(picked)) / rows, gradient

        return self._prepared(run)

    def bias_relu(self, rows: int, columns: int) -> Prepared:
        """Value and gradients in one pass over blocks of rows; the sums by products."""
        rng = np.random.default_rng(5)
        x, seed = rng.standard_normal((2, rows, columns), np.float32)
        b = rng.standard_normal(columns, np.float32)
        y, gx = np.empty((2, rows, columns), np.float32)
        gb = np.zeros((THREADS, columns), np.float32)
        block = max(1, BLOCK // columns)
        zeros = np.zeros(columns, np.float32)
        ones = np.ones(block, np.float32)
        masks = np.empty((THREADS, block, columns), np.int32)

        def work(s: slice, thread: int) -> None:
            part, g, mask = y[s], gx[s], masks[thread, : s.stop - s.start]
            np.add(x[s], b, part)
            np.maximum(part, zeros, out=part)
            np.sign(part.view(np.int32), mask)
            np.multiply(seed[s].view(np.int32), mask, g.view(np.int32))
            gb[thread] += np.dot(ones[: len(g)], g)

        blocks = Blocks(rows, work, block, x.size)

        def run() -> Any:
            gb[...] = 0
            blocks()
            return y, gx, gb.sum(0)

        return self._prepared(run)

    def gradient(self, *_args: Any) -> Any:
        """Nothing is derived automatically here."""
        raise Unsupported("is written out for training steps and their parts only")


PEER = NumPyByHand
