"""What a peer is: a few functions in its own words, and what every case makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.device import most_memory_of_cupy
from benchmarks.problems import CHECKED_STEPS, Net, images


class Unsupported(Exception):
    """The peer has no way to do this: its cell says why, and nothing is wrong."""


class Ops(SimpleNamespace):
    """The functions, beside Python's operators, that cases are written in, as a peer has them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks, not a case
            raise AttributeError(name)
        raise Unsupported(f"has no {name}")


class Prepared(NamedTuple):
    """A case, ready: `run` does it once; `result` gives the numbers that peers must agree on."""

    run: Callable[[], Any]
    result: Callable[[], list[float]]


# From (images, labels) to the loss, having taken one step; and from images to logits.
Training = tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]


class Peer:
    """One library, used as its users do. What it leaves out, it does not support.

    packages  the distributions whose versions and sizes are reported, the peer's own first.
    clock     "cupy" or "torch" where a GPU's own clock can be read through that library.

    The methods after `adam` are the kinds of cases; each returns a `Prepared`. They are written
    once, here, in terms of the others; a peer that has a better way overrides them.
    """

    packages: tuple[str, ...] = ()
    clock: str | None = None
    ops = Ops()

    def __init__(self, variant: str, device: str) -> None:
        self.variant = variant
        self.device = device

    # ---- what a peer says in its own words

    def array(self, value: Any) -> Any:
        """Return an array of the peer's own from a NumPy array, where it computes."""
        return value

    def numpy(self, value: Any) -> Any:
        """Return a NumPy array from one of the peer's own."""
        return np.asarray(value)

    def wait(self, result: Any) -> None:
        """Return when `result` has been computed."""

    def gradient(
        self,
        f: Callable[..., Any],
        arrays: Sequence[Any],
        seed: Any = None,
        given: Sequence[Any] = (),
    ) -> Callable[[], Any]:
        """Return a function that computes f(*arrays, *given) and its gradients by the arrays.

        seed   the upstream gradient; None for a scalar f.
        given  arguments, not captured: a compiler computes beforehand what depends on constants.
        """
        raise Unsupported("has no reverse mode")

    def forward(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that computes f, recording nothing."""
        constants = [self.array(a) for a in arrays]
        return lambda: f(*constants)

    def recorded(self, f: Callable[..., Any], arrays: Sequence[Any]) -> Callable[[], Any]:
        """Return a function that computes f and records what a reverse pass needs."""
        raise Unsupported("records nothing by itself")

    def jacobian(self, f: Callable[..., Any], array: Any) -> Callable[[], Any]:
        """Return a function that computes the Jacobian of f."""
        raise Unsupported("has no Jacobian")

    def hvp(self, f: Callable[..., Any], array: Any, vector: Any) -> Callable[[], Any]:
        """Return a function that computes the product of f's Hessian with a vector."""
        raise Unsupported("has no second derivatives")

    def mlp(self, net: Net) -> Training:
        """Return a step and a prediction of a net with its first weights."""
        raise Unsupported("trains no nets")

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return a function that updates an array by Adam and returns it."""
        raise Unsupported("has no optimiser to measure alone")

    def rows(self, data: tuple[Any, Any], rows: Any) -> tuple[Any, Any]:
        """Return a mini-batch of (images, labels) for `mlp`'s step."""
        x, y = data
        return self.array(x[rows]), self.array(y[rows])

    def watch_memory(self) -> None:
        """Begin to note how much of the device's memory is taken, where nobody else does."""
        if self.clock == "cupy":
            self._most_memory = most_memory_of_cupy()

    def device_bytes(self) -> int | None:
        """Return the device memory taken at the most, where that is known."""
        return self._most_memory() if self.clock == "cupy" else None

    # ---- the kinds of cases

    def _prepared(self, run: Callable[[], Any]) -> Prepared:
        return Prepared(run, lambda: self.numbers(run()))

    def numbers(self, result: Any) -> list[float]:
        """Return numbers by which results are compared: a scalar itself, two norms of an array.

        Sums are of no use here: where they cancel, rounding is all that is left of them.
        """
        if isinstance(result, (tuple, list)):
            return [number for part in result for number in self.numbers(part)]
        values = np.asarray(self.numpy(result), np.float64)
        if values.size == 1:
            return [float(values.reshape(()))]
        root = float(np.sqrt(np.mean(values * values)))
        return [root, float(np.mean(np.abs(values - root)))]

    def mlp_step(self, **net: Any) -> Prepared:
        """One training step of a multi-layer perceptron."""
        problem = Net(**net)
        batches = itertools.cycle([(self.array(x), self.array(y)) for x, y in problem.data])
        step, _ = self.mlp(problem)

        def run() -> Any:
            return step(*next(batches))

        return Prepared(run, lambda: self.numbers([run() for _ in range(CHECKED_STEPS)]))

    def polynomial(self) -> Prepared:
        """The first example of every lecture: (x**2 + y**2)**2 with both derivatives."""
        point = [np.float32(3), np.float32(5)]
        return self._prepared(self.gradient(lambda x, y: (x**2 + y**2) ** 2, point))

    def softmax_cross_entropy(self, rows: int, classes: int) -> Prepared:
        """The mean loss of a batch of logits, and its gradient."""
        rng = np.random.default_rng(4)
        logits = rng.standard_normal((rows, classes), np.float32)
        labels = rng.integers(0, classes, rows)
        return self._prepared(self.gradient(self.ops.cross_entropy, [logits], given=[labels]))

    def bias_relu(self, rows: int, columns: int) -> Prepared:
        """relu(x + b), and the gradients of both for a given upstream gradient."""
        rng = np.random.default_rng(5)
        x, seed = rng.standard_normal((2, rows, columns), np.float32)
        b = rng.standard_normal(columns, np.float32)
        relu = self.ops.relu
        return self._prepared(self.gradient(lambda x, b: relu(x + b), [x, b], seed))

    def linear_relu(self, rows: int, inputs: int, outputs: int) -> Prepared:
        """relu(x @ w + b), and the gradients of all three for a given upstream gradient."""
        rng = np.random.default_rng(6)
        arrays = [rng.standard_normal(s, np.float32) for s in ((rows, inputs), (inputs, outputs))]
        arrays.append(rng.standard_normal(outputs, np.float32))
        seed = rng.standard_normal((rows, outputs), np.float32)
        return self._prepared(self.gradient(self.ops.linear_relu, arrays, seed))

    def adam_update(self, size: int) -> Prepared:
        """One step of Adam over a long array."""
        rng = np.random.default_rng(7)
        parameters, gradient = rng.standard_normal((2, size), np.float32)
        run = self.adam(parameters, gradient, 1e-3)
        return Prepared(run, lambda: self.numbers([run() for _ in range(CHECKED_STEPS)][-1]))

    def copy(self, size: int) -> Prepared:
        """Copy a long array into another: the memory's ceiling."""
        raise Unsupported("the ceilings are measured with array libraries")

    def gemm(self, size: int) -> Prepared:
        """Multiply two square matrices: the arithmetic's ceiling."""
        raise Unsupported("the ceilings are measured with array libraries")

    def operation(self, name: str, size: int, mode: str, count: int) -> Prepared:
        """`count` equal operations in a row, on `size` elements."""
        rng = np.random.default_rng(8)
        f, arrays = _OPERATIONS[name](rng, size, self.ops)

        def chain(x: Any, *constants: Any) -> Any:
            for _ in range(count):
                x = f(x, *constants)
            return x

        if mode == "gradient":
            total = self.ops.sum
            return self._prepared(self.gradient(lambda *a: total(chain(*a)), arrays))
        how = self.forward if mode == "plain" else self.recorded
        return self._prepared(how(chain, arrays))

    def chain(self, nodes: int) -> Prepared:
        """A value and gradient through `nodes` operations, one after the other."""

        def f(x: Any) -> Any:
            for _ in range(nodes // 2):
                x = x * 0.999 + 0.001
            return x

        return self._prepared(self.gradient(f, [np.float32(0.5)]))

    def fan_out(self, nodes: int) -> Prepared:
        """A value and gradient where one variable is used in each of `nodes` / 2 products."""

        def f(x: Any) -> Any:
            total = x * 0.5
            for i in range(nodes // 2):
                total = total + x * (1 / (i + 1))
            return total

        return self._prepared(self.gradient(f, [np.float32(0.5)]))

    def jacobian_of_layer(self, size: int) -> Prepared:
        """The Jacobian of tanh(a @ x), size by size."""
        rng = np.random.default_rng(9)
        a = self.array(rng.standard_normal((size, size), np.float32) / np.float32(size))
        tanh, matvec = self.ops.tanh, self.ops.matvec
        x = rng.standard_normal(size, np.float32)
        return self._prepared(self.jacobian(lambda x: tanh(matvec(a, x)), x))

    def hvp_of_layer(self, rows: int, size: int) -> Prepared:
        """The Hessian of the sum of tanh(x @ w)**2, by w, times a matrix."""
        rng = np.random.default_rng(10)
        x = self.array(rng.standard_normal((rows, size), np.float32) / np.float32(size))
        w, vector = rng.standard_normal((2, size, size), np.float32)
        tanh, total = self.ops.tanh, self.ops.sum

        def f(w: Any) -> Any:
            y = tanh(x @ w)
            return total(y * y)

        return self._prepared(self.hvp(f, w, vector))

    def train_until(self, data: str, accuracy: float, epochs: int, **net: Any) -> Prepared:
        """Build a net and train it until it has so much of the test set right."""
        problem, given = Net(**net), images(data)
        train = given.train_images, given.train_labels
        test = self.array(given.test_images)
        reached: list[float] = []

        def run() -> None:
            step, predict = self.mlp(problem)
            for _, orders in zip(range(epochs), given.orders(problem.batch), strict=False):
                for rows in orders:
                    step(*self.rows(train, rows))
                right = self.numpy(predict(test)).argmax(1) == given.test_labels
                if right.mean() >= accuracy:
                    reached.append(1.0)
                    return
            raise RuntimeError(
                f"{right.mean():.1%} of the test set right after {epochs} epochs, "
                f"{accuracy:.0%} were asked for"
            )

        # Peers may need an epoch more or less: rounding decides an image on the edge.
        return Prepared(run, lambda: reached[-1:])

    def epoch(self, data: str, rows: int | None, **net: Any) -> Prepared:
        """One epoch over the training images (the first `rows` of them), shuffled."""
        problem, given = Net(**net), images(data)
        train = given.train_images[:rows], given.train_labels[:rows]
        step, _ = self.mlp(problem)
        few = type(given)(*train, *train)
        orders = few.orders(problem.batch)

        def run() -> Any:
            loss = None
            for rows in next(orders):
                loss = step(*self.rows(train, rows))
            return loss

        def result() -> list[float]:
            first = next(orders)[:CHECKED_STEPS]
            return self.numbers([step(*self.rows(train, rows)) for rows in first])

        return Prepared(run, result)


def _elementwise(f: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(rng: Any, size: int, ops: Any) -> Any:
        x = rng.uniform(0.5, 1, (2, size)).astype(np.float32)
        return f(ops), [*x]

    return prepare


def _matmul(rng: Any, size: int, _ops: Any) -> Any:
    n = max(1, round(size**0.5))
    x = rng.standard_normal((n, n), np.float32)
    rotation = np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32)
    return (lambda y, q: y @ q), [x, rotation]


# What is repeated, and on what; each keeps numbers in range however often it is repeated.
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _elementwise(lambda _ops: lambda y, c: y + c),
    "multiply": _elementwise(lambda _ops: lambda y, c: y * c),
    "tanh": _elementwise(lambda ops: lambda y, _c: ops.tanh(y)),
    "minus mean": _elementwise(lambda ops: lambda y, _c: y - ops.mean(y)),
    "matmul": _matmul,
}
