"""Triton: the parts that memory bounds, as kernels of its language; PyTorch holds the arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.peers.base import Peer, Prepared

_BLOCK = 1024  # elements of an elementwise program


@triton.jit
def _copy(x, y, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, at < size), at < size)


@triton.jit
def _cross_entropy(logits, labels, losses, gradient, classes, share, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row, which stays in registers: read once, its gradient written once."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < classes
    z = tl.load(logits + row * classes + at, inside, float("-inf"))
    label = tl.load(labels + row)
    z -= tl.max(z, 0)
    e = tl.exp(z)
    total = tl.sum(e, 0)
    picked = tl.sum(tl.where(at == label, z, 0.0), 0)
    tl.store(losses + row, tl.log(total) - picked)
    g = (e / total - tl.where(at == label, 1.0, 0.0)) * share
    tl.store(gradient + row * classes + at, g, inside)


@triton.jit
def _bias_relu(x, b, seed, y, gx, sums, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of columns and some rows; the sums of these rows go to a line of their own."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    bias = tl.load(b + at, inside)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for i in range(ROWS):
        row = first + i + tl.zeros((BLOCK,), tl.int64)
        mask = inside & (row < rows)
        place = row * columns + at
        out = tl.maximum(tl.load(x + place, mask) + bias, 0.0)
        g = tl.where(out > 0, tl.load(seed + place, mask, 0.0), 0.0)
        tl.store(y + place, out, mask)
        tl.store(gx + place, g, mask)
        total += g
    tl.store(sums + tl.program_id(1) * columns + at, total, inside)


@triton.jit
def _adam(p, m, v, g, size, rate, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    d = tl.load(g + at, inside)
    first = 0.9 * tl.load(m + at, inside) + 0.1 * d
    second = 0.999 * tl.load(v + at, inside) + 0.001 * d * d
    step = rate * first / (tl.sqrt(second) + epsilon)
    tl.store(m + at, first, inside)
    tl.store(v + at, second, inside)
    tl.store(p + at, tl.load(p + at, inside) - step, inside)


class Triton(Peer):
    """Its products and nets are those of torch.compile, which writes Triton on a GPU."""

    packages = ("triton", "torch")

    def __init__(self, variant: str, device: str) -> None:
        super().__init__(variant, device)
        self._place = "cuda" if device == "gpu" else "cpu"  # a CPU interprets it, for tests
        self.clock = "torch" if device == "gpu" else None

    def array(self, value: Any) -> Any:
        """Return a tensor on the device."""
        return torch.tensor(value, device=self._place)

    def numpy(self, value: Any) -> Any:
        """Return the tensor's values."""
        return value.cpu().numpy()

    def wait(self, result: Any) -> None:
        """Wait for the GPU."""
        if self.device == "gpu":
            torch.cuda.synchronize()

    def copy(self, size: int) -> Prepared:
        """Copy one tensor into another."""
        x = torch.ones(size, device=self._place)
        y = torch.empty_like(x)

        def run() -> Any:
            _copy[(triton.cdiv(size, _BLOCK),)](x, y, size, BLOCK=_BLOCK)
            return y

        return self._prepared(run)

    def softmax_cross_entropy(self, rows: int, classes: int) -> Prepared:
        """Losses and their gradient in one launch, and the mean of the losses."""
        rng = np.random.default_rng(4)
        logits = self.array(rng.standard_normal((rows, classes), np.float32))
        labels = self.array(rng.integers(0, classes, rows))
        block = triton.next_power_of_2(classes)
        warps = min(16, max(4, block // 256))

        def run() -> Any:
            losses, gradient = torch.empty_like(logits[:, 0]), torch.empty_like(logits)
            _cross_entropy[(rows,)](
                logits, labels, losses, gradient, classes, 1 / rows, BLOCK=block, num_warps=warps
            )
            return losses.mean(), gradient

        return self._prepared(run)

    def bias_relu(self, rows: int, columns: int) -> Prepared:
        """Value and gradients in one launch, and the sum of the partial sums."""
        rng = np.random.default_rng(5)
        x, seed = map(self.array, rng.standard_normal((2, rows, columns), np.float32))
        b = self.array(rng.standard_normal(columns, np.float32))
        height, width = 64, min(_BLOCK, triton.next_power_of_2(columns))
        grid = triton.cdiv(columns, width), triton.cdiv(rows, height)

        def run() -> Any:
            y, gx = torch.empty_like(x), torch.empty_like(x)
            sums = torch.empty((grid[1], columns), device=self._place)
            _bias_relu[grid](x, b, seed, y, gx, sums, rows, columns, ROWS=height, BLOCK=width)
            return y, gx, sums.sum(0)

        return self._prepared(run)

    def adam(self, parameters: Any, gradient: Any, rate: float) -> Callable[[], Any]:
        """Return the update of one long array."""
        p, g = self.array(parameters), self.array(gradient)
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        size, steps = p.numel(), 0

        def run() -> Any:
            nonlocal steps
            steps += 1
            root = (1 - 0.999**steps) ** 0.5
            scaled = rate * root / (1 - 0.9**steps)
            _adam[(triton.cdiv(size, _BLOCK),)](p, m, v, g, size, scaled, 1e-8 * root, BLOCK=_BLOCK)
            return p

        return run


PEER = Triton
