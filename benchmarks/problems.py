"""The data that all peers start from: nets with their first weights, batches, and real images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

# Steps whose losses must agree before anything is timed.
CHECKED_STEPS = 5
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Net:
    """A multi-layer perceptron: ReLU between layers, softmax cross-entropy at the end.

    widths     of the layers, input first.
    optimizer  "sgd" or "adam" (0.9, 0.999, 1e-8).
    """

    widths: tuple[int, ...]
    batch: int
    optimizer: str
    learning_rate: float
    batches: int | None = None  # different ones, taken in turn; None: as many as suit the memory

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON makes them a list

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of each layer."""
        return list(zip(self.widths, self.widths[1:], strict=False))

    @property
    def parameters(self) -> int:
        """Return how many numbers are trained."""
        return sum((i + 1) * o for i, o in self.layers)

    @property
    def flops(self) -> float:
        """Return the floating-point operations of one step's products.

        Three of equal cost a layer, and two in the first, whose input needs no gradient.
        """
        products = [2.0 * self.batch * i * o for i, o in self.layers]
        return 3 * sum(products) - products[0]

    @property
    def bytes_alive(self) -> int:
        """Return the bytes that a step cannot do without, its data apart.

        Parameters, their gradients, the optimiser's slots, every hidden activation, and two
        gradients of the widest hidden layer.
        """
        slots = {"sgd": 0, "adam": 2}[self.optimizer]
        hidden = self.widths[1:-1]
        return 4 * (
            (2 + slots) * self.parameters + self.batch * (sum(hidden) + 2 * max(hidden, default=0))
        )

    def weights(self) -> Iterator[tuple[Array, Array]]:
        """Yield each layer's first kernel and bias, one by one, so that no copy outlives its use.

        Kernels have He's standard deviation; biases are small numbers and not 0, so that a peer
        which forgot one is found out.
        """
        rng = np.random.default_rng(1)
        for i, o in self.layers:
            kernel = rng.standard_normal((i, o), np.float32) * np.float32((2 / i) ** 0.5)
            yield kernel, rng.standard_normal(o, np.float32) * np.float32(0.01)

    @property
    def data(self) -> list[tuple[Array, Labels]]:
        """Return batches of normal inputs with random labels."""
        return _batches(self)


@lru_cache(maxsize=1)
def _batches(net: Net) -> list[tuple[Array, Labels]]:
    """Make the batches of a net, once.

    Several, so that no peer trains on one until its gradients vanish: numbers near the smallest
    float32 take many times as long to compute with.
    """
    rng = np.random.default_rng(2)
    count = net.batches or max(1, min(64, _BATCH_BYTES // (4 * net.batch * net.widths[0])))
    return [
        (
            rng.standard_normal((net.batch, net.widths[0]), np.float32),
            rng.integers(0, net.widths[-1], net.batch),
        )
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Images:
    """Images to train and test on, as float32 between 0 and 1, with labels."""

    train_images: Array
    train_labels: Labels
    test_images: Array
    test_labels: Labels

    def orders(self, batch: int) -> Iterator[list[NDArray[np.int64]]]:
        """Yield, epoch after epoch, the rows of each full batch: the same for every peer."""
        rng = np.random.default_rng(3)
        rows = len(self.train_labels)
        while True:
            order = rng.permutation(rows)
            yield [order[i : i + batch] for i in range(0, rows - batch + 1, batch)]


def images(name: str) -> Images:
    """Return a data set by the name that tapegrad gives it.

    Raises `FileNotFoundError` where its files are not on this machine.
    """
    import tapegrad as tg

    with tg.backend("numpy"):
        found = tg.data.load(name)
    return Images(found.train_images, found.train_labels, found.test_images, found.test_labels)
