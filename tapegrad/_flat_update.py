"""FlatUpdate: what an optimiser does to flat buffers, block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._blocks import BLOCK, for_blocks, lanes
from tapegrad.primitive import Update


class FlatUpdate(Update):
    """An Update of flat arrays by a rule on their blocks; the last of them is the gradient.

    Arrays of 16 bits are computed with in float32 and rounded once: 0.999 may be 1 in 16 bits, and
    the square of a small gradient 0.

    rule     what is done with a block.
    numbers  what the rule needs, of the hyper-parameters: Python numbers, or a device's arrays.

    One setting more than `numbers` takes is a factor for the gradient. Parameters go to the rule,
    but for those that `numbers` takes by name.
    """

    __slots__ = ("named", "numbers", "rule", "settings")

    def __init__(
        self,
        name: str,
        rule: Callable[..., None],
        numbers: Callable[..., tuple[Any, ...]],
        *,
        writes: int,
        kernel: Callable[..., Any],
    ) -> None:
        super().__init__(name, self._forward, writes=writes, kernel=kernel)
        self.rule = rule
        self.numbers = numbers
        code = numbers.__code__
        self.settings = code.co_argcount
        self.named = code.co_varnames[self.settings :][: code.co_kwonlyargcount]

    def _forward(self, xp: Module, *inputs: Any, **params: Any) -> None:
        arrays, settings = inputs[: self.writes + 1], inputs[self.writes + 1 :]
        g = arrays[-1]
        wide = computed_in(g.dtype)
        settings, factors = settings[: self.settings], settings[self.settings :]
        formula, params = self.formula(params)
        if xp is np:  # a ufunc takes an array without axes in two thirds of the time of a scalar
            numbers = [np.array(k, wide) for k in formula(*[x.item() for x in settings])]
        else:  # computed where they are: asking for their values would wait for the device
            numbers = [k.astype(wide) for k in formula(*settings)]
        factor = factors[0].astype(wide) if factors else None
        self.update_blocks(xp, arrays, spares(xp, g.size, wide), numbers, factor, **params)

    def formula(self, params: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return the numbers as a function of the settings alone, and the rule's parameters."""
        own = {name: params[name] for name in self.named if name in params}
        if not own:
            return self.numbers, params
        rest = {name: value for name, value in params.items() if name not in own}
        return functools.partial(self.numbers, **own), rest

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

        def update(parts: Sequence[Array], spare: Array) -> None:
            narrow = parts[: self.writes] if parts[0].dtype != spare.dtype else ()
            if narrow:
                parts = [part.astype(spare.dtype) for part in parts]
            if factor is not None:
                parts = [*parts[:-1], parts[-1] * factor]
            self.rule(xp, *parts, spare, *numbers, **params)
            for part, value in zip(narrow, parts, strict=False):
                part[...] = value

        def block(s: slice, lane: int) -> None:
            update([a[s] for a in arrays], scratch[lane][: s.stop - s.start])

        # On a GPU one launch for all, and on this thread: on another one another stream is current.
        if xp is not np or arrays[0].size <= BLOCK:
            update(arrays, scratch[0])
        else:
            for_blocks(arrays[0].size, block)


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which an update of arrays of this type computes."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def spares(xp: Module, size: int, dtype: Any) -> list[Array]:
    """Return scratch for each lane of an update of so many elements."""
    if xp is not np:
        return [xp.empty(size, dtype)]
    return [xp.empty(min(size, BLOCK), dtype) for _ in range(lanes(size))]
