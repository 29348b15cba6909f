"""NumPy, and CuPy where a GPU is: what one writes at first, every array fresh, no derivative free.

Beside the column itself: what the peers without optimisers or layers of their own share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.base import Ops, Peer, Prepared, Training
from benchmarks.problems import Net


class ArrayLibrary(Peer):
    """Variants: numpy, cupy. The gradients are written out by hand, plainly."""

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        if variant == "cupy":
            import cupy as xp

            self.clock = "cupy"
            self.packages = (f"cupy-cuda{xp.cuda.runtime.runtimeGetVersion() // 1000}x", "numpy")
        else:
            xp = np
            self.packages = ("numpy",)
        self.xp = xp
        self.ops = Ops(tanh=xp.tanh, sum=xp.sum, mean=xp.mean, matvec=xp.matmul)

    def array(self, value: Any) -> Any:
        """Return an array of the module."""
        return self.xp.asarray(value)

    def numpy(self, value: Any) -> Any:
        """Return the values."""
        return value.get() if hasattr(value, "get") else np.asarray(value)

    def wait(self, result: Any) -> None:
        """Wait for the GPU."""
        if self.clock:
            self.xp.cuda.Device().synchronize()

    def mlp(self, net: Net) -> Training:
        """Return a step as a textbook has it."""
        xp = self.xp
        layers = [[self.array(kernel), self.array(bias)] for kernel, bias in net.weights()]
        update = updater(xp, net.optimizer, net.learning_rate)

        def model(x: Any) -> tuple[list[Any], Any]:
            activations = [x]
            for kernel, bias in layers[:-1]:
                activations.append(xp.maximum(activations[-1] @ kernel + bias, 0))
            return activations, activations[-1] @ layers[-1][0] + layers[-1][1]

        def step(x: Any, y: Any) -> Any:
            activations, logits = model(x)
            loss, g = cross_entropy(xp, logits, y)
            gradients = []
            for i in range(len(layers) - 1, -1, -1):
                gradients.append([activations[i].T @ g, g.sum(0)])
                if i:
                    g = (g @ layers[i][0].T) * (activations[i] > 0)
            update(layers, gradients[::-1])
            return loss

        return step, lambda x: model(x)[1]

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return Adam on one array."""
        layers, gradients = [[self.array(parameters)]], [[self.array(gradient)]]
        update = updater(self.xp, "adam", rate)

        def run() -> Any:
            update(layers, gradients)
            return layers[0][0]

        return run

    def softmax_cross_entropy(self, rows: int, classes: int) -> Prepared:
        """The loss and p - one_hot."""
        rng = np.random.default_rng(4)
        logits = self.array(rng.standard_normal((rows, classes), np.float32))
        labels = self.array(rng.integers(0, classes, rows))
        return self._prepared(lambda: cross_entropy(self.xp, logits, labels))

    def bias_relu(self, rows: int, columns: int) -> Prepared:
        """The value and both gradients."""
        rng = np.random.default_rng(5)
        x, seed = (self.array(a) for a in rng.standard_normal((2, rows, columns), np.float32))
        b = self.array(rng.standard_normal(columns, np.float32))

        def run() -> Any:
            y = self.xp.maximum(x + b, 0)
            g = seed * (y > 0)
            return y, g, g.sum(0)

        return self._prepared(run)

    def linear_relu(self, rows: int, inputs: int, outputs: int) -> Prepared:
        """The value and three gradients."""
        rng = np.random.default_rng(6)
        x = self.array(rng.standard_normal((rows, inputs), np.float32))
        w = self.array(rng.standard_normal((inputs, outputs), np.float32))
        b = self.array(rng.standard_normal(outputs, np.float32))
        seed = self.array(rng.standard_normal((rows, outputs), np.float32))

        def run() -> Any:
            y = self.xp.maximum(x @ w + b, 0)
            g = seed * (y > 0)
            return y, g @ w.T, x.T @ g, g.sum(0)

        return self._prepared(run)

    def copy(self, size: int) -> Prepared:
        """Copy one array into another."""
        x = self.xp.ones(size, np.float32)
        y = self.xp.empty_like(x)

        def run() -> Any:
            y[...] = x
            return y

        return self._prepared(run)

    def gemm(self, size: int) -> Prepared:
        """Multiply two square matrices."""
        x = self.xp.full((size, size), 0.5, np.float32)
        y = self.xp.empty_like(x)
        return self._prepared(lambda: self.xp.matmul(x, x, out=y))


def cross_entropy(xp: Any, logits: Any, labels: Any) -> tuple[Any, Any]:
    """Return the mean loss and the gradient of the logits."""
    rows = xp.arange(len(labels))
    p = xp.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -xp.log(p[rows, labels]).mean()
    p[rows, labels] -= 1
    return loss, p / np.float32(len(labels))


def updater(xp: Any, optimizer: str, rate: float) -> Callable[[Any, Any], None]:
    """Return a function that updates lists of lists of arrays by their gradients, plainly."""
    if optimizer == "sgd":

        def sgd(layers: Any, gradients: Any) -> None:
            for layer, given in zip(layers, gradients, strict=True):
                for i, g in enumerate(given):
                    layer[i] = layer[i] - rate * g

        return sgd
    moments: list[list[tuple[Any, Any]]] = []
    t = 0

    def adam(layers: Any, gradients: Any) -> None:
        nonlocal t
        t += 1
        if not moments:
            moments.extend([[(xp.zeros_like(p), xp.zeros_like(p)) for p in x] for x in layers])
        for layer, given, slots in zip(layers, gradients, moments, strict=True):
            for i, g in enumerate(given):
                m = 0.9 * slots[i][0] + 0.1 * g
                v = 0.999 * slots[i][1] + 0.001 * g * g
                slots[i] = m, v
                root = xp.sqrt(v / (1 - 0.999**t)) + 1e-8
                layer[i] = layer[i] - rate * (m / (1 - 0.9**t)) / root

    return adam


PEER = ArrayLibrary
