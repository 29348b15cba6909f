"""Random training programs: the same seed gives the same network, loss, optimiser and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import tapegrad as tg

nn, losses = tg.nn, tg.losses

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: x,
    **{
        name: getattr(nn, name)
        for name in (
            "relu", "relu6", "leaky_relu", "elu", "selu", "gelu", "sigmoid", "log_sigmoid", "silu",
            "tanh", "softplus", "softsign", "softmax", "log_softmax",
        )
    },
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu_by_hand": lambda x: tg.maximum(x, 0.0),
    "relu_by_where": lambda x: tg.where(x > 0, x, 0.0),
    "square": lambda x: x * x * 0.1,
    "normalised": lambda x: (x - tg.mean(x, axis=-1, keepdims=True))
    / (tg.std(x, axis=-1, keepdims=True) + 0.5),
    "clipped": lambda x: tg.clip(x, -0.5, 1.5),
    "sin": tg.sin,
}  # fmt: skip


def _by_hand(y: Any, t: Any) -> Any:
    return -tg.mean(tg.take_along_axis(nn.log_softmax(y), tg.expand_dims(t, 1), axis=1))


def _softmax_by_hand(y: Any, t: Any) -> Any:
    e = tg.exp(y - tg.max(y, axis=1, keepdims=True))
    p = e / tg.sum(e, axis=1, keepdims=True)
    return -tg.sum(tg.log(p) * tg.one_hot(t, y.shape[1], dtype=y.dtype)) / y.shape[0]


def _class_weights(y: Any) -> Any:
    return np.linspace(0.5, 1.5, y.shape[1])


CE = nn.softmax_cross_entropy
# By the kind of targets: what makes a scalar of the network's output and the targets.
LOSSES: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "labels": {
        "ce": CE,
        "ce sum": lambda y, t: CE(y, t, reduction="sum") * 0.1,
        "ce none": lambda y, t: tg.mean(CE(y, t, reduction="none")),
        "ce smoothed": lambda y, t: CE(y, t, label_smoothing=0.1),
        "ce ignored": lambda y, t: CE(y, t, ignore_label=0),
        "ce weights": lambda y, t: CE(y, t, class_weights=_class_weights(y)),
        "ce all": lambda y, t: CE(
            y, t, class_weights=_class_weights(y), ignore_label=0, label_smoothing=0.2
        ),
        "sparse": lambda y, t: losses.SparseCategoricalCrossentropy(from_logits=True)(t, y),
        "sparse ignored": lambda y, t: losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=0
        )(t, y),
        "sparse of probabilities": lambda y, t: losses.SparseCategoricalCrossentropy()(
            t, nn.softmax(y)
        ),
        "by hand": _by_hand,
        "softmax by hand": _softmax_by_hand,
        "logsumexp": lambda y, t: tg.mean(
            tg.logsumexp(y, axis=1) - tg.sum(y * tg.one_hot(t, y.shape[1], dtype=y.dtype), axis=1)
        ),
    },
    "probabilities": {
        "ce": CE,
        "ce smoothed": lambda y, t: CE(y, t, label_smoothing=0.1),
        "ce weights": lambda y, t: CE(y, t, class_weights=_class_weights(y)),
        "sigmoid ce": nn.sigmoid_cross_entropy,
        "sigmoid ce sum": lambda y, t: nn.sigmoid_cross_entropy(y, t, reduction="sum") * 0.1,
        "categorical": lambda y, t: losses.CategoricalCrossentropy()(t, nn.softmax(y)),
        "kl": lambda y, t: losses.KLDivergence()(t, nn.softmax(y)),
        "binary": lambda y, t: losses.BinaryCrossentropy()(t, nn.sigmoid(y)),
        "binary logits": lambda y, t: losses.BinaryCrossentropy(from_logits=True)(t, y),
    },
    "numbers": {
        "mse": lambda y, t: losses.MeanSquaredError()(t, y),
        "mae": lambda y, t: losses.MeanAbsoluteError()(t, y),
        "huber": lambda y, t: losses.Huber(0.7)(t, y),
        "mse weighted": lambda y, t: losses.MeanSquaredError()(t, y, np.arange(1.0, len(y) + 1)),
        "square": lambda y, t: tg.mean((y - t) ** 2),
        "root": lambda y, t: tg.sqrt(tg.mean(tg.square(y - t)) + 0.1),
        "norm": lambda y, t: tg.norm(y - t) * 0.1,
        "cosh": lambda y, t: tg.mean(tg.log(tg.cosh(tg.clip(y - t, -3.0, 3.0)))),
    },
}

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: tg.optimizers.SGD(0.05),
    "momentum": lambda: tg.optimizers.SGD(0.02, momentum=0.9),
    "nesterov": lambda: tg.optimizers.SGD(0.02, momentum=0.9, nesterov=True),
    "adagrad": lambda: tg.optimizers.Adagrad(0.05),
    "rmsprop": lambda: tg.optimizers.RMSprop(0.01),
    "adam": lambda: tg.optimizers.Adam(0.01),
    "adam without epsilon": lambda: tg.optimizers.Adam(0.01, epsilon=0.0),
    "adamw": lambda: tg.optimizers.AdamW(0.01),
    "by hand": lambda: None,
}
# What a step does beside: names, so that a failure says which.
EXTRAS = (
    "penalty", "jacobian", "persistent", "nested", "clip", "decay", "average", "metrics", "two",
    "gradients", "noise", "stop", "mixed", "recompute", "weights",
)  # fmt: skip


class Training:
    """A network, its step, its data; `describe()` says what they are."""

    def __init__(self, seed: int, dtype: Any = None) -> None:
        rng = np.random.default_rng(seed)
        pick = lambda things: list(things)[rng.integers(len(things))]
        self.dtype = np.dtype(pick(("f4", "f8")) if dtype is None else dtype)
        depth = int(rng.integers(0, 5))
        self.widths = [int(w) for w in rng.choice([1, 2, 3, 5, 8, 16, 33], depth + 2)]
        if self.widths[-1] == 1:
            self.widths[-1] = 2
        self.batch = int(rng.choice([1, 2, 3, 7, 16, 32]))
        self.activations = [pick(ACTIVATIONS) for _ in range(depth)]
        self.ways = [pick(WAYS) for _ in range(depth + 1)]
        self.kind = pick(LOSSES)
        self.loss = pick(LOSSES[self.kind])
        self.optimizer_name = pick(OPTIMIZERS)
        self.dropout = float(pick((0.0, 0.0, 0.3)))
        self.extras = sorted({pick(EXTRAS) for _ in range(rng.integers(0, 4))})
        if "transposed" in self.ways and "clip" in self.extras:
            # The gradients lie transposed in memory, and a sum goes in the order of memory.
            self.extras.remove("clip")
        self._data = np.random.default_rng(seed + 1)
        self._build(rng)

    def describe(self) -> str:
        return (
            f"{self.dtype} {self.widths} batch {self.batch} {self.activations} {self.ways} "
            f"{self.kind}: {self.loss}, {self.optimizer_name}, dropout {self.dropout} {self.extras}"
        )

    def _build(self, rng: np.random.Generator) -> None:
        self.parameters: list[tg.Variable] = []
        self._layers = []
        for i, (way, n, m) in enumerate(
            zip(self.ways, self.widths[:-1], self.widths[1:], strict=True)
        ):
            shape = (m, n) if way == "transposed" else (n, m)
            values = rng.normal(size=shape) / np.sqrt(n)
            own = [tg.Variable(values.astype(self.dtype), name=f"w{i}")]
            if way != "no bias":
                own.append(tg.Variable(rng.normal(size=m).astype(self.dtype) * 0.1, name=f"b{i}"))
            self._layers.append((WAYS[way], own))
            self.parameters += own
        self.optimizer = OPTIMIZERS[self.optimizer_name]()
        self.second = tg.optimizers.SGD(0.01)
        # NumPy makes a new array of an F-ordered one; the averages must not share its memory.
        self.averages = [tg.Variable(v, trainable=False) for v in self.parameters]
        self.mean = tg.metrics.Mean()
        self.accuracy = tg.metrics.Accuracy()
        self.steps = tg.Variable(0, trainable=False)
        self._generator = tg.random.Generator(5)

    def state(self) -> list[Any]:
        """Return everything that a step changes."""
        slots = [] if self.optimizer is None else [
            self.optimizer.slot(v, name)
            for v in self.parameters
            if v.id in self.optimizer._place_of
            for name in self.optimizer._SLOTS
        ]  # fmt: skip
        found = [*self.parameters, *self.averages, self.steps, self._generator.counter, *slots]
        return [np.array(v.numpy()) for v in [*found, self.mean.result()]]

    def batches(self, count: int) -> Iterator[tuple[Any, Any]]:
        n, classes = self.batch, self.widths[-1]
        for _ in range(count):
            x = self._data.normal(size=(n, self.widths[0])).astype(self.dtype)
            if self.kind == "labels":
                t = self._data.integers(0, classes, n)
            elif self.kind == "numbers":
                t = self._data.normal(size=(n, classes)).astype(self.dtype)
            else:
                t = self._data.dirichlet(np.ones(classes), n).astype(self.dtype)
            yield tg.constant(x), tg.constant(t)

    def forward(self, x: Any) -> Any:
        for i, (layer, own) in enumerate(self._layers):
            x = layer(x, *own)
            if i < len(self.activations):
                x = ACTIVATIONS[self.activations[i]](x)
                if self.dropout and i == 0:
                    x = nn.dropout(x, self.dropout)
        return x

    def _loss(self, x: Any, t: Any) -> tuple[Any, Any]:
        if "noise" in self.extras:
            x = x + self._generator.normal(x.shape, stddev=0.1, dtype=x.dtype)
        forward = tg.recompute_grad(self.forward) if "recompute" in self.extras else self.forward
        if "penalty" in self.extras:
            with tg.GradientTape() as inner:
                inner.watch(x)
                y = forward(x)
                total = tg.sum(y)
            slope = inner.gradient(total, x, unconnected_gradients="zero")
            penalty = tg.mean(tg.square(tg.norm(slope + 0.1, axis=1) - 1.0))
        else:
            y, penalty = forward(x), None
        loss = LOSSES[self.kind][self.loss](y, t)
        if "weights" in self.extras:
            loss = loss * tg.mean(tg.abs(x)) / 2
        if "stop" in self.extras:
            loss = loss + 0.1 * tg.mean((y - tg.stop_gradient(tg.tanh(y))) ** 2)
        if "decay" in self.extras:
            loss = loss + 1e-3 * sum(tg.sum(v * v) for v in self.parameters)
        if "mixed" in self.extras:
            loss = loss + tg.mean(tg.astype(y, tg.float64) ** 2) * 0.01
        return y, loss if penalty is None else loss + 0.1 * penalty

    def _gradients(self, x: Any, t: Any) -> tuple[Any, Any, list[Any], Any]:
        parameters = self.parameters
        zero = {"unconnected_gradients": "zero"}
        other: Any = None
        if "nested" in self.extras:
            with tg.GradientTape() as outer:
                with tg.GradientTape() as tape:
                    y, loss = self._loss(x, t)
                first = tape.gradient(loss, parameters[-1], **zero)
                size = tg.sum(first * first)
            other = outer.gradient(size, parameters[0], **zero)
            with tg.GradientTape() as tape:
                y, loss = self._loss(x, t)
            return y, loss, tape.gradient(loss, parameters, **zero), other
        persistent = "persistent" in self.extras or "jacobian" in self.extras
        with tg.GradientTape(persistent=persistent) as tape:
            y, loss = self._loss(x, t)
        if "jacobian" in self.extras:
            other = tape.jacobian(y[0], parameters[-1], **zero)
        elif persistent:
            other = tape.gradient(y, parameters[-1], **zero)
        return y, loss, tape.gradient(loss, parameters, **zero), other

    def step(self, x: Any, t: Any) -> Any:
        y, loss, gradients, other = self._gradients(x, t)
        if "clip" in self.extras:
            size = tg.sqrt(sum(tg.sum(g * g) for g in gradients))
            factor = tg.minimum(1.0, 0.5 / (size + 1e-6))
            gradients = [g * tg.astype(factor, g.dtype) for g in gradients]
        pairs = list(zip(gradients, self.parameters, strict=True))
        if "two" in self.extras and len(pairs) > 1:
            self.second.apply_gradients(pairs[:1])
            pairs = pairs[1:]
        if self.optimizer is None:
            for g, v in pairs:
                v.assign_sub(g * 0.05)
        else:
            self.optimizer.apply_gradients(pairs)
        self.steps.assign_add(1)
        if "average" in self.extras:
            for average, v in zip(self.averages, self.parameters, strict=True):
                average.assign(average * 0.9 + v * 0.1)
        if "metrics" in self.extras:
            self.mean.update_state(loss)
            if self.kind == "labels":
                self.accuracy.update_state(t, y)
        result = {"loss": loss, "other": other}
        if "gradients" in self.extras:
            result["gradients"] = gradients
            result["y"] = y
        return result

    def run(self, function: Callable[[Any, Any], Any], count: int) -> list[Any]:
        """Take steps by a function, which may be the compiled one; return all results."""
        tg.random.seed(11)
        with np.errstate(all="ignore"):
            return [function(x, t) for x, t in self.batches(count)]


WAYS: dict[str, Callable[..., Any]] = {
    "linear": nn.linear,
    "linear_relu": nn.linear_relu,
    "operators": lambda x, w, b: x @ w + b,
    "transposed": lambda x, w, b: x @ w.T + b,
    "no bias": lambda x, w: x @ w,
    "bias first": lambda x, w, b: b + tg.matmul(x, w),
    "einsum": lambda x, w, b: tg.einsum("ni,io->no", x, w) + b,
}
