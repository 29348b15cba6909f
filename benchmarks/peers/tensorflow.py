"""TensorFlow: eager, `tf.function`, and `tf.function(jit_compile=True)`, which uses XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from benchmarks.peers.base import Ops, Training
from benchmarks.peers.taped import TapePeer
from benchmarks.problems import Net

# Keras adds it before the bias correction, which makes it some 10 to 30 times larger in the first
# steps: so much less of it is closer to what the others compute.
_EPSILON = 5e-10


def _cross_entropy(logits: Any, labels: Any) -> Any:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return tf.reduce_mean(losses)


class TensorFlow(TapePeer):
    """Variants: eager, function, xla."""

    packages = ("tensorflow", "numpy")
    tf = tf
    ops = Ops(
        tanh=tf.tanh,
        sum=tf.reduce_sum,
        mean=tf.reduce_mean,
        matvec=tf.linalg.matvec,
        relu=tf.nn.relu,
        linear_relu=lambda x, w, b: tf.nn.relu(x @ w + b),
        cross_entropy=_cross_entropy,
    )

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        tf.config.experimental.enable_tensor_float_32_execution(False)

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return a tf.function in the columns that have one."""
        if self.variant == "eager":
            return f
        return tf.function(f, jit_compile=self.variant == "xla")

    def wait(self, result: Any) -> None:
        """Read one number: TensorFlow gives no other way that all its versions have."""
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if self.device == "gpu" and hasattr(part, "shape"):
                tf.reshape(part, [-1])[:1].numpy()

    def mlp(self, net: Net) -> Training:
        """Return a step with Variables and a Keras optimiser."""
        layers = [(tf.Variable(kernel), tf.Variable(bias)) for kernel, bias in net.weights()]
        hidden, last = layers[:-1], layers[-1]
        variables = [variable for layer in layers for variable in layer]
        adam = net.optimizer == "adam"
        kind = tf.keras.optimizers.Adam if adam else tf.keras.optimizers.SGD
        optimizer = kind(net.learning_rate, **({"epsilon": _EPSILON} if adam else {}))
        optimizer.build(variables)

        def model(x: Any) -> Any:
            for kernel, bias in hidden:
                x = tf.nn.relu(x @ kernel + bias)
            return x @ last[0] + last[1]

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = _cross_entropy(model(x), y)
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return loss

        return self.compiled(step), self.compiled(model)

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the optimiser's step for one long Variable."""
        variable, g = tf.Variable(parameters), self.array(gradient)
        optimizer = tf.keras.optimizers.Adam(rate, epsilon=_EPSILON)
        optimizer.build([variable])
        update = self.compiled(lambda: optimizer.apply_gradients([(g, variable)]))

        def run() -> Any:
            update()
            return variable

        return run


PEER = TensorFlow
