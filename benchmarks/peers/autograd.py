"""HIPS autograd: NumPy functions traced and differentiated; the optimiser is plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
from autograd.core import make_vjp
from autograd.differential_operators import hessian_vector_product, jacobian

from benchmarks.peers.array_library import updater
from benchmarks.peers.base import Ops, Peer, Training
from benchmarks.problems import Net


def _cross_entropy(logits: Any, labels: Any) -> Any:
    shifted = logits - anp.max(logits, axis=1, keepdims=True)
    total = anp.log(anp.sum(anp.exp(shifted), axis=1))
    return anp.mean(total - shifted[anp.arange(len(labels)), labels])


class Autograd(Peer):
    """float32 arrays stay float32."""

    packages = ("autograd", "numpy")
    ops = Ops(
        tanh=anp.tanh,
        sum=anp.sum,
        mean=anp.mean,
        matvec=anp.dot,
        relu=lambda x: anp.maximum(x, np.float32(0)),
        linear_relu=lambda x, w, b: anp.maximum(anp.dot(x, w) + b, np.float32(0)),
        cross_entropy=_cross_entropy,
    )

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a function that traces f anew each time, as autograd does."""
        start = tuple(arrays)

        def run() -> Any:
            pull_back, value = make_vjp(lambda a: f(*a, *given), start)
            return value, *pull_back(np.float32(1) if seed is None else seed)

        return run

    def recorded(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that traces f and asks for nothing."""
        start = tuple(arrays)
        return lambda: make_vjp(lambda a: f(*a), start)[1]

    def jacobian(self, f: Callable[..., Any], array: Any) -> Callable[[], Any]:
        """Return autograd's Jacobian."""
        function = jacobian(f)
        return lambda: function(array)

    def hvp(self, f: Callable[..., Any], array: Any, vector: Any) -> Callable[[], Any]:
        """Return autograd's Hessian-vector product."""
        function = hessian_vector_product(f)
        return lambda: function(array, vector)

    def mlp(self, net: Net) -> Training:
        """Return a step over a list of [kernel, bias]."""
        layers = [[kernel, bias] for kernel, bias in net.weights()]
        update = updater(np, net.optimizer, net.learning_rate)

        def model(layers: Any, x: Any) -> Any:
            for kernel, bias in layers[:-1]:
                x = anp.maximum(anp.dot(x, kernel) + bias, np.float32(0))
            return anp.dot(x, layers[-1][0]) + layers[-1][1]

        loss_and_gradient = autograd.value_and_grad(
            lambda layers, x, y: _cross_entropy(model(layers, x), y)
        )

        def step(x: Any, y: Any) -> Any:
            loss, gradients = loss_and_gradient(layers, x, y)
            update(layers, gradients)
            return loss

        return step, lambda x: model(layers, x)


PEER = Autograd
