"""tapegrad itself: eager, compiled by `tapegrad.function`, and with its kernels turned off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tapegrad as tg
from benchmarks.peers.base import Ops, Training, Unsupported
from benchmarks.peers.taped import TapePeer
from benchmarks.problems import Net


class Tapegrad(TapePeer):
    """The backend, and whether kernels are used, are set by the column's environment."""

    packages = ("tapegrad", "numpy")
    tf = tg
    ops = Ops(
        tanh=tg.tanh,
        sum=tg.sum,
        mean=tg.mean,
        matvec=tg.matmul,
        relu=tg.nn.relu,
        linear_relu=tg.nn.linear_relu,
        cross_entropy=tg.nn.softmax_cross_entropy,
    )

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        if variant == "compiled" and not hasattr(tg, "function"):
            raise Unsupported("this version of tapegrad has no tapegrad.function")
        if tg.get_backend() == "cupy":
            import cupy

            self.clock, self._cupy = "cupy", cupy
            self.packages = (
                *self.packages,
                f"cupy-cuda{cupy.cuda.runtime.runtimeGetVersion() // 1000}x",
            )

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return tapegrad.function(f) in the compiled column."""
        return tg.function(f) if self.variant == "compiled" else f

    def wait(self, result: Any) -> None:
        """Wait for the GPU; NumPy has finished when it returns."""
        if self.clock:
            self._cupy.cuda.Device().synchronize()

    def recorded(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that records f on a tape and asks for nothing."""
        if self.variant == "compiled":
            raise Unsupported("a compiled function records nothing when it runs")
        sources = [tg.Variable(a) for a in arrays]

        def run() -> Any:
            with tg.GradientTape():
                return f(*sources)

        return run

    def mlp(self, net: Net) -> Training:
        """Return the explicit training loop's step."""
        layers = [(tg.Variable(kernel), tg.Variable(bias)) for kernel, bias in net.weights()]
        hidden, last = layers[:-1], layers[-1]
        variables = [variable for layer in layers for variable in layer]
        adam = net.optimizer == "adam"
        optimizer = (tg.optimizers.Adam if adam else tg.optimizers.SGD)(net.learning_rate)
        linear, linear_relu = tg.nn.linear, tg.nn.linear_relu

        def model(x: Any) -> Any:
            for kernel, bias in hidden:
                x = linear_relu(x, kernel, bias)
            return linear(x, *last)

        def step(x: Any, y: Any) -> Any:
            with tg.GradientTape() as tape:
                loss = tg.nn.softmax_cross_entropy(model(x), y)
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return loss

        return self.compiled(step), self.compiled(model)

    def rows(self, data: tuple[Any, Any], rows: Any) -> tuple[Any, Any]:
        """Leave the rows to NumPy: compiled functions take its arrays as they are."""
        if self.variant != "compiled" or self.clock:
            return super().rows(data, rows)
        x, y = data
        return x[rows], y[rows]

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the optimiser's step for one long Variable."""
        variable, g = tg.Variable(parameters), self.array(gradient)
        optimizer = tg.optimizers.Adam(rate)

        def update() -> None:
            optimizer.apply_gradients([(g, variable)])

        update = self.compiled(update)

        def run() -> Any:
            update()
            return variable

        return run


PEER = Tapegrad
