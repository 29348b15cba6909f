"""FlatUpdate: what an optimiser does to flat buffers, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tapegrad._backend import Array, Module
from tapegrad._blocks import BLOCK, for_rows, lanes
from tapegrad.primitive import Update


class FlatUpdate(Update):
    """An Update of flat arrays by a rule on their blocks; the last of them is the gradient.

    Arrays of 16 bits are computed with in float32 and rounded once: 0.999 may be 1 in 16 bits, and
    the square of a small gradient 0.

    rule     what is done with a block.
    numbers  what the rule needs, of the hyper-parameters: Python numbers, or a device's arrays.
    counts   whether the step count is the first setting, before those that `numbers` takes: the
             last that it returns is then a function of the count, for the numbers that change.

    One setting more than these is a factor for the gradient. Parameters go to the rule, but for
    those that `numbers` takes by name.
    """

    __slots__ = ("_known", "_named", "counts", "numbers", "rule", "settings")

    def __init__(
        self,
        name: str,
        rule: Callable[..., None],
        numbers: Callable[..., tuple[Any, ...]],
        *,
        counts: bool = False,
        writes: int,
        kernel: Callable[..., Any],
    ) -> None:
        super().__init__(name, self._forward, writes=writes, kernel=kernel)
        self.rule = rule
        self.numbers = numbers
        self.counts = counts
        code = numbers.__code__
        self.settings = code.co_argcount + counts
        self._known: dict[Any, Any] = {}  # what `_on_host` has found
        self._named = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]

    def _forward(self, xp: Module, *inputs: Any, **params: Any) -> None:
        arrays, settings = inputs[: self.writes + 1], inputs[self.writes + 1 :]
        g = arrays[-1]
        wide = computed_in(g.dtype)
        settings, factors = settings[: self.settings], settings[self.settings :]
        if xp is np:
            numbers, params = self._on_host([x.item() for x in settings], params, wide)
        else:  # asking for a device's values would wait for it: it computes where they are
            units, params = self.split(params)
            constant, at = self.split_numbers(settings[self.counts :], units)
            found = constant if at is None else (*constant, *at(settings[0]))
            numbers = [k.astype(wide) for k in found]
        scratch = spares(xp, g.size, wide)
        if g.size <= BLOCK and g.dtype == wide and not factors:
            self.rule(xp, *arrays, scratch[0], *numbers, **params)
            return
        factor = factors[0].astype(wide) if factors else None
        self.update_blocks(xp, arrays, scratch, numbers, factor, **params)

    def _on_host(
        self, settings: list[Any], params: dict[str, Any], dtype: np.dtype[Any]
    ) -> tuple[list[Array], dict[str, Any]]:
        """Return the rule's numbers and its parameters; most are those of the step before."""
        step = settings.pop(0) if self.counts else None
        key = (dtype, *settings, *params.items())
        known = self._known.get(key)
        if known is None:
            units, rest = self.split(params)
            found, at = self.split_numbers(settings, units)
            # A ufunc takes an array without axes in two thirds of the time of a scalar.
            constant = [np.array(k, dtype) for k in found]
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[key] = constant, at, rest
        constant, at, rest = known
        return constant if at is None else constant + [np.array(k, dtype) for k in at(step)], rest

    def split_numbers(
        self, settings: Sequence[Any], units: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Callable[[Any], tuple[Any, ...]] | None]:
        """Return the numbers that stay, and the function of the step count for those after them."""
        found = self.numbers(*settings, **units)
        return (found[:-1], found[-1]) if self.counts else (found, None)

    def split(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters that `numbers` takes, and those that the rule does."""
        if not params:
            return params, params
        own = {name: value for name, value in params.items() if name in self._named}
        return own, {name: value for name, value in params.items() if name not in own}

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
            for_rows(arrays[0].size, BLOCK, len(scratch), block)


_MOST_KNOWN = 64


def computed_in(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which an update of arrays of this type computes."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def spares(xp: Module, size: int, dtype: Any, *, beside_products: bool = False) -> list[Array]:
    """Return scratch for each lane of an update of so many elements."""
    if xp is not np:
        return [xp.empty(size, dtype)]
    count = lanes(size, beside_products=beside_products)
    return [xp.empty(min(size, BLOCK), dtype) for _ in range(count)]
