"""tinygrad: lazy tensors; the training step under `TinyJit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, TinyJit
from tinygrad.nn import optim

from benchmarks.peers.base import Ops, Peer, Prepared, Training, Unsupported
from benchmarks.problems import Net


class TinyGrad(Peer):
    """Everything is realised before it is timed: tinygrad computes nothing until asked."""

    packages = ("tinygrad",)
    ops = Ops(
        tanh=lambda x: x.tanh(),
        sum=lambda x: x.sum(),
        mean=lambda x: x.mean(),
        relu=lambda x: x.relu(),
        linear_relu=lambda x, w, b: (x @ w + b).relu(),
        cross_entropy=lambda logits, labels: logits.sparse_categorical_crossentropy(labels),
    )

    def array(self, value: Any) -> Any:
        """Return a tensor with memory of its own: it would borrow NumPy's, and lose it."""
        return Tensor(np.asarray(value)).clone().realize()

    def numpy(self, value: Any) -> Any:
        """Return the tensor's values."""
        return value.numpy()

    def wait(self, result: Any) -> None:
        """Wait for the device."""
        Device[Device.DEFAULT].synchronize()

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a jitted function that realises f and its gradients."""
        leaves = [self.array(a) for a in arrays]
        upstream = None if seed is None else self.array(seed)
        constants = [self.array(a) for a in given]

        @TinyJit
        def run(*arguments: Any) -> Any:
            leaves = arguments[: len(arrays)]
            value = f(*arguments)
            gradients = value.gradient(*leaves, gradient=upstream)
            return value.realize(*gradients), *gradients

        return lambda: run(*leaves, *constants)

    def mlp(self, net: Net) -> Training:
        """Return a jitted step."""
        layers = []
        for kernel, bias in net.weights():
            layers.append((self.array(kernel), self.array(bias)))
        parameters = [p for layer in layers for p in layer]
        adam = net.optimizer == "adam"
        kind = optim.Adam if adam else optim.SGD
        optimizer = kind(parameters, net.learning_rate, **({"eps": 1e-8} if adam else {}))

        def model(x: Any) -> Any:
            for kernel, bias in layers[:-1]:
                x = (x @ kernel + bias).relu()
            return x @ layers[-1][0] + layers[-1][1]

        @TinyJit
        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = model(x).sparse_categorical_crossentropy(y).backward()
            return loss.realize(*optimizer.schedule_step())  # together, or it sees new weights

        # The jit gives out one buffer again and again: the losses to compare are copied first.
        return (lambda x, y: step(x, y).clone().realize()), TinyJit(lambda x: model(x).realize())

    def chain(self, nodes: int) -> Prepared:
        """Not tried: scheduling as many operations takes minutes."""
        raise Unsupported("10,000 operations in one graph take minutes to schedule")

    fan_out = chain


PEER = TinyGrad
