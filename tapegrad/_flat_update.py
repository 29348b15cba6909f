"""FlatUpdate: what an optimiser does to flat buffers, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._blocks import BLOCK, for_blocks, lanes
from tapegrad.primitive import Update


class FlatUpdate(Update):
    """An Update of flat arrays by a rule on their blocks; the last of them is the gradient.

    rule     what is done with a block.
    numbers  what the rule needs, of the hyper-parameters as Python numbers.

    One setting more than `numbers` takes is a factor for the gradient.
    """

    __slots__ = ("numbers", "rule", "settings")

    def __init__(
        self,
        name: str,
        rule: Callable[..., None],
        numbers: Callable[..., tuple[float, ...]],
        *,
        writes: int,
        kernel: Callable[..., Any],
    ) -> None:
        super().__init__(name, self._forward, writes=writes, kernel=kernel)
        self.rule = rule
        self.numbers = numbers
        self.settings = numbers.__code__.co_argcount

    def _forward(self, xp: Module, *inputs: Any, **params: Any) -> None:
        arrays, settings = inputs[: self.writes + 1], inputs[self.writes + 1 :]
        g = arrays[-1]
        settings, factors = settings[: self.settings], settings[self.settings :]
        numbers = [g.dtype.type(k) for k in self.numbers(*[x.item() for x in settings])]
        scratch = spares(xp, g.size, g.dtype)
        factor = factors[0].astype(g.dtype) if factors else None
        self.update_blocks(xp, arrays, scratch, numbers, factor, **params)

    def update_blocks(
        self,
        xp: Module,
        arrays: Sequence[Array],
        scratch: Sequence[Array],
        numbers: Sequence[Any],
        factor: Any = None,
        **params: Any,
    ) -> None:
        """Go through the arrays block by block; `scratch` is for each lane."""

        def block(s: slice, lane: int) -> None:
            spare = scratch[lane][: s.stop - s.start]
            parts = [a[s] for a in arrays]
            if factor is not None:
                parts[-1] = parts[-1] * factor
            self.rule(xp, *parts, spare, *numbers, **params)

        if xp is np:
            for_blocks(arrays[0].size, block)
        else:  # one launch for all, and on this thread: on another one another stream is current
            block(slice(0, arrays[0].size), 0)


def spares(xp: Module, size: int, dtype: Any) -> list[Array]:
    """Return scratch for each lane of an update of so many elements."""
    if xp is not np:
        return [xp.empty(size, dtype)]
    return [xp.empty(min(size, BLOCK), dtype) for _ in range(lanes(size))]
