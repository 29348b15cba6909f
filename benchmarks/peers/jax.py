"""JAX: whole functions under `jax.jit`, the training step with its state donated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.base import Ops, Peer, Prepared, Training, Unsupported
from benchmarks.problems import Net


def _cross_entropy(logits: Any, labels: Any) -> Any:
    logged = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logged, labels[:, None], 1).mean()


class Jax(Peer):
    """float32 as it is: no TF32 on a GPU."""

    packages = ("jax", "jaxlib", "numpy")
    ops = Ops(
        tanh=jnp.tanh,
        sum=jnp.sum,
        mean=jnp.mean,
        matvec=jnp.matmul,
        relu=jax.nn.relu,
        linear_relu=lambda x, w, b: jax.nn.relu(x @ w + b),
        cross_entropy=_cross_entropy,
    )

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        jax.config.update("jax_default_matmul_precision", "highest")

    def array(self, value: Any) -> Any:
        """Return an array on the device."""
        return jnp.asarray(value)

    def wait(self, result: Any) -> None:
        """Block until everything in `result` has been computed."""
        jax.block_until_ready(result)

    def device_bytes(self) -> int | None:
        """Return the allocator's peak, where the backend tells it."""
        found = jax.devices()[0].memory_stats() or {}
        return found.get("peak_bytes_in_use")

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a jitted value_and_grad, or vjp where an upstream gradient is given."""
        sources, constants = ([self.array(a) for a in x] for x in (arrays, given))
        if seed is None:
            function = jax.jit(jax.value_and_grad(f, tuple(range(len(sources)))))

            def run() -> Any:
                value, gradients = function(*sources, *constants)
                return value, *gradients

            return run

        @jax.jit
        def with_seed(seed: Any, sources: Any, constants: Any) -> Any:
            value, pull_back = jax.vjp(lambda *sources: f(*sources, *constants), *sources)
            return value, *pull_back(seed)

        return partial(with_seed, self.array(seed), sources, constants)

    def jacobian(self, f: Callable[..., Any], array: Any) -> Callable[[], Any]:
        """Return a jitted jacrev."""
        return partial(jax.jit(jax.jacrev(f)), self.array(array))

    def hvp(self, f: Callable[..., Any], array: Any, vector: Any) -> Callable[[], Any]:
        """Return the derivative of the gradient along the vector, jitted."""

        @jax.jit
        def product(x: Any, v: Any) -> Any:
            return jax.jvp(jax.grad(f), (x,), (v,))[1]

        return partial(product, self.array(array), self.array(vector))

    def mlp(self, net: Net) -> Training:
        """Return a jitted step over a list of (kernel, bias), optimiser included."""
        start = [(jnp.asarray(kernel), jnp.asarray(bias)) for kernel, bias in net.weights()]
        tree, rate = jax.tree, net.learning_rate

        def model(parameters: Any, x: Any) -> Any:
            for kernel, bias in parameters[:-1]:
                x = jax.nn.relu(x @ kernel + bias)
            kernel, bias = parameters[-1]
            return x @ kernel + bias

        def loss_of(parameters: Any, x: Any, y: Any) -> Any:
            return _cross_entropy(model(parameters, x), y)

        @partial(jax.jit, donate_argnums=0)
        def sgd(state: Any, x: Any, y: Any) -> Any:
            (parameters,) = state
            loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y)
            return (tree.map(lambda p, g: p - rate * g, parameters, gradients),), loss

        @partial(jax.jit, donate_argnums=0)
        def adam(state: Any, x: Any, y: Any) -> Any:
            parameters, moments, t = state
            loss, gradients = jax.value_and_grad(loss_of)(parameters, x, y)
            return _adam(parameters, gradients, moments, t, rate), loss

        if net.optimizer == "sgd":
            step_of, state = sgd, [(start,)]
        else:
            zeros = tree.map(jnp.zeros_like, start), tree.map(jnp.zeros_like, start)
            step_of, state = adam, [(start, zeros, jnp.float32(0))]

        def step(x: Any, y: Any) -> Any:
            state[0], loss = step_of(state[0], x, y)
            return loss

        predict = jax.jit(model)
        return step, lambda x: predict(state[0][0], x)

    def rows(self, data: tuple[Any, Any], rows: Any) -> tuple[Any, Any]:
        """Leave the rows to NumPy: jitted functions take its arrays as they are."""
        x, y = data
        return x[rows], y[rows]

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the update of one long array, its state donated."""
        p, g = self.array(parameters), self.array(gradient)
        update = jax.jit(partial(_adam, rate=rate), donate_argnums=(0, 2, 3))
        state = [(p, (jnp.zeros_like(p), jnp.zeros_like(p)), jnp.float32(0))]

        def run() -> Any:
            p, moments, t = state[0]
            state[0] = update(p, g, moments, t)
            return state[0][0]

        return run

    def chain(self, nodes: int) -> Prepared:
        """Not traced: XLA takes minutes to compile as many operations."""
        raise Unsupported("10,000 operations in a row are a loop to JAX, not a graph")

    fan_out = chain


def _adam(parameters: Any, gradients: Any, moments: Any, t: Any, rate: float) -> Any:
    m, v = moments
    t = t + 1
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradients)
    a, b = 1 - 0.9**t, 1 - 0.999**t
    parameters = jax.tree.map(
        lambda p, m, v: p - rate * (m / a) / (jnp.sqrt(v / b) + 1e-8), parameters, m, v
    )
    return parameters, (m, v), t


PEER = Jax
