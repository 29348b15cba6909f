"""MyGrad: tensors over NumPy with `backward`; the optimiser is plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mygrad as mg
import numpy as np
from mygrad.nnet.activations import relu
from mygrad.nnet.losses import softmax_crossentropy

from benchmarks.peers.array_library import updater
from benchmarks.peers.base import Ops, Peer, Training
from benchmarks.problems import Net


class MyGrad(Peer):
    """Constants are NumPy arrays, which MyGrad takes as they are."""

    packages = ("mygrad", "numpy")
    ops = Ops(
        tanh=mg.tanh,
        sum=mg.sum,
        mean=mg.mean,
        relu=relu,
        linear_relu=lambda x, w, b: relu(x @ w + b),
        cross_entropy=softmax_crossentropy,
    )

    def numpy(self, value: Any) -> Any:
        """Return the tensor's values."""
        return value.data if isinstance(value, mg.Tensor) else np.asarray(value)

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a function that goes backward from f of fresh leaves' values."""
        leaves = [mg.tensor(a) for a in arrays]

        def run() -> Any:
            value = f(*leaves, *given)
            value.backward(seed)
            gradients = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.null_grad()
            return value, *gradients

        return run

    def recorded(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that builds the graph and asks for nothing."""
        leaves = [mg.tensor(a) for a in arrays]
        return lambda: f(*leaves)

    def forward(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that computes f with tracking off."""
        constants = [mg.tensor(a, constant=True) for a in arrays]

        def run() -> Any:
            with mg.no_autodiff:
                return f(*constants)

        return run

    def mlp(self, net: Net) -> Training:
        """Return a step over tensors."""
        layers = [[mg.tensor(kernel), mg.tensor(bias)] for kernel, bias in net.weights()]
        update = updater(np, net.optimizer, net.learning_rate)

        def model(x: Any) -> Any:
            for kernel, bias in layers[:-1]:
                x = relu(x @ kernel + bias)
            return x @ layers[-1][0] + layers[-1][1]

        def step(x: Any, y: Any) -> Any:
            loss = softmax_crossentropy(model(x), y)
            loss.backward()
            values = [[p.data for p in layer] for layer in layers]
            update(values, [[p.grad for p in layer] for layer in layers])
            for layer, new in zip(layers, values, strict=True):
                for p, value in zip(layer, new, strict=True):
                    p.data = value
                    p.null_grad()
            return loss

        def predict(x: Any) -> Any:
            with mg.no_autodiff:
                return model(x)

        return step, predict


PEER = MyGrad
