"""Optimisers by Keras's names: parameters and state lie flat, and one pass updates all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tapegrad import _backend
from tapegrad._backend import Array, Module
from tapegrad._blocks import BLOCK
from tapegrad._flat_update import FlatUpdate
from tapegrad._host_memory import neighbours
from tapegrad._recording import no_record, state
from tapegrad._storage import Buffer
from tapegrad._structure import flatten
from tapegrad.errors import TapeWarning
from tapegrad.kernels import optimizers as kernels
from tapegrad.linear import cast, reshape
from tapegrad.primitive import Update
from tapegrad.tensor import Operand, Tensor
from tapegrad.variable import Variable, assign_add, over_memory

# Elements from which copying gradients to one place costs more than a call for each.
_APART = 1 << 16

# Each variable begins at a multiple of so many bytes: what GPU loads and GEMMs want.
_ALIGNMENT = 256


# ---- the updates
#
# An update is a rule on blocks of flat arrays, in place: `rule(xp, *arrays, spare, *numbers)`, with
# scratch of a block's size and numbers of the arrays' type (a wider type would promote). Its
# numbers come from the hyper-parameters, 0-d float64 arrays, and `step`, a 0-d int64 array: a
# compiled program looks in every call whether they are what they were.
#
# A moving average `a = keep * a + (1 - keep) * x` may be kept as a / unit, where the unit is what
# 1 - keep was at first: then x is added as it is, and a pass over memory is saved for each average.


def _sgd_numbers(learning_rate: float) -> tuple[float, ...]:
    return (learning_rate,)


def _sgd_rule(xp: Module, p: Array, g: Array, spare: Array, rate: Any) -> None:
    xp.multiply(g, rate, spare)
    xp.subtract(p, spare, p)


def _momentum_numbers(learning_rate: float, momentum: float) -> tuple[float, ...]:
    return learning_rate, momentum


def _momentum_rule(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    spare: Array,
    rate: Any,
    mu: Any,
    *,
    nesterov: bool,
) -> None:
    multiply, subtract, add = xp.multiply, xp.subtract, xp.add
    multiply(g, rate, spare)
    multiply(v, mu, v)
    subtract(v, spare, v)
    if nesterov:
        subtract(p, spare, p)
        multiply(v, mu, spare)
        add(p, spare, p)
    else:
        add(p, v, p)


def _divide_by_root(xp: Module, g: Array, square: Array, spare: Array, rate: Any, eps: Any) -> None:
    """Let spare = rate * g / (sqrt(square) + eps).

    With an epsilon of 0 a parameter that never had a gradient (padding, say) would be 0 / 0: it
    does not move.
    """
    xp.sqrt(square, spare)
    xp.add(spare, eps, spare)
    if xp is not np or not eps.item():  # a device would be waited for
        spare[...] = xp.where(spare == 0, spare.dtype.type(math.inf), spare)
    xp.divide(g, spare, spare)
    xp.multiply(spare, rate, spare)


def _adagrad_numbers(learning_rate: float, epsilon: float) -> tuple[float, ...]:
    return learning_rate, epsilon


def _adagrad_rule(
    xp: Module, p: Array, a: Array, g: Array, spare: Array, rate: Any, eps: Any
) -> None:
    xp.multiply(g, g, spare)
    xp.add(a, spare, a)
    _divide_by_root(xp, g, a, spare, rate, eps)
    xp.subtract(p, spare, p)


def _average(xp: Module, a: Array, x: Array, spare: Array, keep: Any, take: Any) -> None:
    """Let a = keep * a + take * x; x may be spare."""
    if xp is not np or take.item() != 1:  # a device would be waited for
        xp.multiply(x, take, spare)
        x = spare
    xp.multiply(a, keep, a)
    xp.add(a, x, a)


def _rmsprop_numbers(
    learning_rate: float, rho: float, epsilon: float, *, unit_of_mean_square: float = 1.0
) -> tuple[float, ...]:
    root = math.sqrt(unit_of_mean_square)
    return learning_rate / root, rho, (1 - rho) / unit_of_mean_square, epsilon / root


def _rmsprop_rule(
    xp: Module,
    p: Array,
    v: Array,
    g: Array,
    spare: Array,
    rate: Any,
    keep: Any,
    take: Any,
    eps: Any,
) -> None:
    xp.multiply(g, g, spare)
    _average(xp, v, spare, spare, keep, take)
    _divide_by_root(xp, g, v, spare, rate, eps)
    xp.subtract(p, spare, p)


def _adam_numbers(
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    weight_decay: float,
    *,
    unit_of_m: float = 1.0,
    unit_of_v: float = 1.0,
) -> tuple[Any, ...]:
    # m / (1 - beta_1**t) / (sqrt(v / (1 - beta_2**t)) + epsilon), with the constants drawn out of
    # the root: two passes over memory fewer.
    square_root = _square_root_for(beta_2)

    def at(step: int) -> tuple[float, ...]:
        root = square_root((1 - beta_2**step) / unit_of_v)
        return learning_rate * root * (unit_of_m / (1 - beta_1**step)), epsilon * root

    take_m, take_v = (1 - beta_1) / unit_of_m, (1 - beta_2) / unit_of_v
    return beta_1, take_m, beta_2, take_v, 1 - learning_rate * weight_decay, at


def _square_root_for(x: Any) -> Callable[[Any], Any]:
    """Return what takes the root of a Python number, or of a device's array where it is."""
    return math.sqrt if type(x) is float else np.sqrt


def _adam_rule(
    xp: Module,
    p: Array,
    m: Array,
    v: Array,
    g: Array,
    spare: Array,
    keep_m: Any,
    take_m: Any,
    keep_v: Any,
    take_v: Any,
    shrink: Any,
    rate: Any,
    eps: Any,
) -> None:
    _average(xp, m, g, spare, keep_m, take_m)
    xp.multiply(g, g, spare)
    _average(xp, v, spare, spare, keep_v, take_v)
    _divide_by_root(xp, m, v, spare, rate, eps)
    if xp is not np or shrink.item() != 1:
        xp.multiply(p, shrink, p)
    xp.subtract(p, spare, p)


sgd_update = FlatUpdate("sgd", _sgd_rule, _sgd_numbers, writes=1, kernel=kernels.sgd)
momentum_update = FlatUpdate(
    "momentum", _momentum_rule, _momentum_numbers, writes=2, kernel=kernels.momentum
)
adagrad_update = FlatUpdate(
    "adagrad", _adagrad_rule, _adagrad_numbers, writes=2, kernel=kernels.adagrad
)
rmsprop_update = FlatUpdate(
    "rmsprop", _rmsprop_rule, _rmsprop_numbers, writes=2, kernel=kernels.rmsprop
)
adam_update = FlatUpdate(
    "adam", _adam_rule, _adam_numbers, counts=True, writes=3, kernel=kernels.adam
)


def _gather(xp: Module, flat: Array, *gradients: Array, places: tuple[int, ...]) -> None:
    for place, g in zip(places, gradients, strict=True):
        part = flat[place : place + g.size]
        # A compiled program on a GPU may have computed it there.
        if xp is np or g.data.ptr != part.data.ptr:
            part[...] = g.reshape(-1)


# Copy gradients to where their parameters stand in the flat buffer.
gather_gradients = Update("gather_gradients", _gather, writes=1)


def _sum_of_squares(xp: Module, g: Array) -> Any:
    if xp is not np:
        return xp.sum(xp.square(g.astype(np.float64)))
    blocks = (g[i : i + BLOCK].astype(np.float64) for i in range(0, g.size, BLOCK))
    return sum(np.dot(block, block) for block in blocks)


def _gradient_factor(xp: Module, factor: Array, limit: Any, scale: Any, *gradients: Array) -> None:
    by = 1 / scale
    norm = by * xp.sqrt(sum(_sum_of_squares(xp, g) for g in gradients))
    shortened = xp.where(norm <= limit, 1.0, limit / xp.maximum(norm, np.finfo(np.float64).tiny))
    # Of an infinite norm limit / norm would be 0: nothing would move, and nobody would know.
    factor[...] = by * xp.where(xp.isfinite(norm), shortened, math.nan)


# What all gradients are multiplied by: 1 / scale, and less where their norm is above the limit.
gradient_factor = Update(
    "gradient_factor", _gradient_factor, writes=1, kernel=kernels.gradient_factor
)


# ---- the flat buffers


class _Run(NamedTuple):
    """Neighbours that all have a gradient: one call of the update."""

    parameters: Variable
    slots: tuple[Variable, ...]
    gradients: Variable
    places: tuple[int, ...]  # of each gradient, from the beginning of the run
    views: tuple[Array, ...]  # of where they go, in their shapes
    # A run for each of them, where that costs less than to gather the gradients: on NumPy, and
    # not in a program, which computes them where they are gathered.
    parts: tuple[_Run, ...]
    units: dict[str, float]  # of the slots, by the names under which the update takes them


class _Group:
    """Variables that lie in one buffer, one after the other, with slots of the same layout.

    units  what each slot is kept in: in the buffer lie its values divided by it.
    """

    def __init__(
        self, members: list[Variable], slots: Sequence[float], units: dict[str, float]
    ) -> None:
        self._xp = xp = _backend.module_of((members[0]._array,))
        if xp is not np:  # matrices first: what their products do not update is then in one piece
            members = sorted(members, key=lambda v: v.ndim != 2)
        self.members = members
        first = members[0]
        self.dtype = first.dtype
        # A kernel saves nothing by it, and 16 bits have no room for it.
        plain = xp is np and not _backend.runs_kernels(xp)
        self.units = units if plain and self.dtype.itemsize >= 4 else {}
        if len(members) == 1 and first._buffer.shared:  # packed by another optimiser: it stays
            self._places = [0]
            self._flat = first._array.reshape(-1)
            self._buffer = first._buffer
        else:
            self._places, end = self._layout(members)
            (self._flat,) = self._memory(end, [0.0])
            self._buffer = Buffer(self._flat)
            self._buffer.shared = True
            for i, variable in enumerate(members):
                view = self._part(self._flat, i)
                view[...] = variable._array
                variable._place(self._buffer, view)
        self._slots = self._memory(self._flat.size, slots)
        self._slot_buffers = [Buffer(slot) for slot in self._slots]
        # A program updates small slots at once, from the gradients and the scratch behind them.
        small = self._xp is np and self._flat.size <= BLOCK
        self._gradients, *_ = self._memory(self._flat.size, [0.0, 0.0] if small else [0.0])
        self._gradient_buffer = Buffer(self._gradients)
        self._runs: dict[tuple[bool, ...], list[tuple[_Run, list[int]]]] = {}

    def _memory(self, size: int, values: Sequence[float]) -> list[Array]:
        if self._xp is np:
            return neighbours(size, self.dtype, values)
        return [self._xp.full(size, value, self.dtype) for value in values]

    def _layout(self, members: list[Variable]) -> tuple[list[int], int]:
        """Return where each variable begins, and where the last one ends.

        On NumPy a bias lies directly under its kernel: then a compiled program takes both for one
        matrix. On a GPU all loads are aligned instead.
        """
        unit = max(1, _ALIGNMENT // self.dtype.itemsize)
        places: list[int] = []
        end = 0
        above: tuple[int, ...] = ()
        for variable in members:
            if not (self._xp is np and len(above) == 2 and variable.shape == above[1:]):
                end = -(-end // unit) * unit
            places.append(end)
            end += variable.size
            above = variable.shape
        return places, -(-end // unit) * unit

    def runs(self, present: tuple[bool, ...]) -> list[tuple[_Run, list[int]]]:
        """Return the maximal runs of members that have a gradient, each with its members."""
        known = self._runs.get(present)
        if known is None:
            stretches: list[list[int]] = []
            for i, here in enumerate(present):
                if here and i and present[i - 1]:
                    stretches[-1].append(i)
                elif here:
                    stretches.append([i])
            known = self._runs[present] = [(self._run(s), s) for s in stretches]
        return known

    def _run(self, stretch: list[int], padded: bool = True) -> _Run:
        start, last = self._places[stretch[0]], stretch[-1]
        end = self._places[last] + self.members[last].size
        if padded and last + 1 == len(self.members):
            end = self._flat.size  # then a write is one of the whole buffer, which is told faster
        part = slice(start, end)
        apart = self._xp is np and end - start >= _APART and len(stretch) > 1
        return _Run(
            over_memory(self._buffer, self._flat[part]),
            tuple(
                over_memory(buffer, slot[part])
                for buffer, slot in zip(self._slot_buffers, self._slots, strict=True)
            ),
            over_memory(self._gradient_buffer, self._gradients[part]),
            tuple(self._places[i] - start for i in stretch),
            tuple(self._part(self._gradients, i) for i in stretch),
            tuple(self._run([i], padded=False) for i in stretch) if apart else (),
            {f"unit_of_{name}": unit for name, unit in self.units.items()},
        )

    def _part(self, flat: Array, i: int) -> Array:
        """Return a member's part of a flat array, in its shape."""
        place, member = self._places[i], self.members[i]
        return flat[place : place + member.size].reshape(member.shape)

    def slot_of(self, variable: Variable, name: str, slot: int) -> Array:
        """Return the values of a variable's part of a slot, in its shape."""
        i = next(k for k, member in enumerate(self.members) if member is variable)
        part = self._part(self._slots[slot], i)
        return part * self.units[name] if name in self.units else part


def _put_in_a_row(variables: list[Variable]) -> None:
    """Let 0-d Variables lie side by side: one look tells a program whether any has changed."""
    if variables and variables[0].backend == "numpy":
        row = np.array([v._array for v in variables])
        buffer = Buffer(row)
        for i, v in enumerate(variables):
            v._place(buffer, row[i, ...])


class Optimizer:
    """What the optimisers share: hyper-parameters, flat buffers, one update for all variables.

    The first step that sees a Variable moves its values, with those of all others it sees first
    then, into one flat buffer for each dtype; values, identity and tapes are unaffected. A Variable
    that another optimiser has packed stays where it is. Hyper-parameters are float64 Variables:
    `optimizer.learning_rate.assign(...)`, or plain assignment, changes them. Every optimiser takes
    two more:

    global_clipnorm    all gradients of a step are multiplied by one factor, so that the norm of
                       all of them together is at most this.
    loss_scale_factor  what the loss was multiplied by before its gradients were taken, that small
                       ones are not lost in 16 bits: they are divided by it first.
    """

    _SLOTS: tuple[str, ...] = ()
    _START: tuple[float, ...] = ()  # the slots' first values; zeros if empty
    # The slots that are moving averages, and which hyper-parameter says what they keep.
    _AVERAGES: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        name: str | None = None,
        *,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
        **hyperparameters: float,
    ) -> None:
        self.name = name or type(self).__name__.lower()
        self._hyperparameters: dict[str, Variable] = {}
        common = {"global_clipnorm": global_clipnorm, "loss_scale_factor": loss_scale_factor}
        for key, number in common.items():
            if number is not None and not number > 0:
                raise ValueError(f"{type(self).__name__}: {key} must be above 0, got {number!r}")
        given = {key: number for key, number in common.items() if number is not None}
        for key, value in {**hyperparameters, **given}.items():
            value = float(value)
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"{type(self).__name__}: {key} must be a number >= 0, got {value!r}"
                )
            self._hyperparameters[key] = Variable(
                value, trainable=False, dtype=np.float64, name=f"{self.name}/{key}"
            )
        _put_in_a_row(list(self._hyperparameters.values()))
        self._iterations = Variable(0, trainable=False, name=f"{self.name}/iterations")
        # What every gradient is multiplied by, where the settings ask for it.
        self._factor = (
            (Variable(1.0, trainable=False, dtype=np.float64, name=f"{self.name}/factor"),)
            if given
            else ()
        )
        # What the update takes, in its order.
        self._settings = (*[self._hyperparameters[key] for key in hyperparameters], *self._factor)
        self._groups: list[_Group] = []
        self._place_of: dict[int, tuple[_Group, int]] = {}
        self._warned: set[int] = set()
        self._known_runs: list[tuple[_Run, list[int]]] = []  # of the last step's variables
        self._known_for: list[int] = []

    def __getattr__(self, name: str) -> Variable:
        found: dict[str, Variable] = self.__dict__.get("_hyperparameters", {})
        if name in found:
            return found[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_hyperparameters", ()):
            self._hyperparameters[name].assign(value)
        elif name in ("global_clipnorm", "loss_scale_factor"):
            raise AttributeError(f"{type(self).__name__} was made without {name}: give it there")
        else:
            object.__setattr__(self, name, value)

    @property
    def iterations(self) -> Variable:
        """How many steps were taken, an int64 Variable."""
        return self._iterations

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Variable]]) -> None:
        """Take one step: update each variable by its gradient.

        grads_and_vars  pairs (gradient, variable), as `zip(gradients, variables)` gives them.

        A variable whose gradient is None stays as it is, its slots too, with one warning that names
        it. Raises `TypeError` for what is no pair or no Variable, `ValueError` for a gradient of
        another shape and a variable given twice.

        >>> w = tg.Variable([1.0, 2.0])
        >>> tg.optimizers.SGD(0.5).apply_gradients([(tg.constant([2.0, 2.0]), w)])
        >>> print(w.value())
        tg.Tensor([0. 1.], shape=(2,), dtype=float32)
        """
        gradients, variables = self._checked(grads_and_vars)
        with no_record():
            # A program updates the same variables in every step: where they lie is found once.
            key = [
                v.id if g is not None else -v.id for g, v in zip(gradients, variables, strict=True)
            ]
            if key != self._known_for:
                self._known_runs, self._known_for = self._runs(gradients, variables), key
            assign_add(self._iterations, 1)
            gathered = []
            for run, given in self._known_runs:
                dtype = run.gradients._array.dtype
                chosen = [
                    g if g._array.dtype == dtype else cast(g, dtype=dtype)
                    for i in given
                    if (g := gradients[i]) is not None
                ]
                if run.parts and not self._factor and not state.recorders:
                    memory = run.parameters
                    memory._buffer.before_write(memory._array)  # at once, not part by part
                    for part, g in zip(run.parts, chosen, strict=True):
                        flat = reshape(g, shape=(g.size,))
                        self._update(part.parameters, part.slots, flat, part.units)
                    continue
                if state.recorders or run.gradients.backend != "numpy":
                    gather_gradients(run.gradients, *chosen, places=run.places)
                else:  # the same, in a third of the time
                    memory = run.gradients
                    memory._buffer.before_write(memory._array)
                    for view, g in zip(run.views, chosen, strict=True):
                        view[...] = g._array
                gathered.append(run)
            for factor in self._factor:
                limit = self._hyperparameters.get("global_clipnorm", math.inf)
                scale = self._hyperparameters.get("loss_scale_factor", 1.0)
                gradient_factor(factor, limit, scale, *[run.gradients for run in gathered])
            for run in gathered:
                self._update(run.parameters, run.slots, run.gradients, run.units)

    def _runs(
        self, gradients: list[Tensor | None], variables: list[Variable]
    ) -> list[tuple[_Run, list[int]]]:
        """Return the runs of variables that have a gradient, and which gradients each takes."""
        self._pack(variables)
        at = {v.id: i for i, v in enumerate(variables) if gradients[i] is not None}
        return [
            (run, [at[group.members[k].id] for k in stretch])
            for group in self._groups
            for run, stretch in group.runs(tuple([v.id in at for v in group.members]))
        ]

    def apply(self, gradients: Any, variables: Any) -> None:
        """Take one step with structures of gradients and of variables that correspond."""
        self.apply_gradients(zip(flatten(gradients), flatten(variables), strict=True))

    def _units(self) -> dict[str, float]:
        """Return what slots may be kept in: see above, at the updates."""
        return {
            slot: 1 - self._hyperparameters[keep]._array.item()
            for slot, keep in self._AVERAGES.items()
        }

    def _update(
        self, p: Variable, slots: tuple[Variable, ...], g: Operand, units: dict[str, float]
    ) -> None:
        raise NotImplementedError

    def _checked(self, grads_and_vars: Iterable[Any]) -> tuple[list[Tensor | None], list[Variable]]:
        """Return the gradients and the variables of the pairs."""
        gradients: list[Tensor | None] = []
        variables: list[Variable] = []
        seen: set[int] = set()
        missing = []
        for pair in grads_and_vars:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"grads_and_vars[{len(variables)}] must be a pair (gradient, variable), "
                    f"got {pair!r}"
                )
            g, variable = pair
            if not isinstance(variable, Variable):
                raise TypeError(
                    f"grads_and_vars[{len(variables)}][1] must be a Variable, got a "
                    f"{type(variable).__name__}: the gradient comes first, the variable second"
                )
            if variable.id in seen:
                raise ValueError(f"variable {variable.name!r} is given twice: add its gradients")
            seen.add(variable.id)
            if g is None:
                if variable.id not in self._warned:
                    self._warned.add(variable.id)
                    missing.append(variable.name)
            else:
                if type(g) is not Tensor:
                    g = g._read() if isinstance(g, Operand) else Tensor(g)
                if g._array.shape != variable._array.shape:
                    raise ValueError(
                        f"variable {variable.name!r} has shape {variable.shape}, "
                        f"its gradient {g.shape}"
                    )
            gradients.append(g)
            variables.append(variable)
        if not variables:
            raise ValueError("no gradients were given: the model has no trainable variables")
        if missing:
            warnings.warn(
                f"no gradient for {', '.join(missing)}: the loss does not depend on them, "
                "and they stay as they are",
                TapeWarning,
                stacklevel=3,
            )
        return gradients, variables

    def _pack(self, variables: list[Variable]) -> None:
        """Give variables seen for the first time their place and their slots."""
        fresh = [v for v in variables if v.id not in self._place_of]
        if not fresh:
            return
        start, units = self._START or (0.0,) * len(self._SLOTS), self._units()
        together: dict[tuple[str, np.dtype[Any]], list[Variable]] = {}
        groups: list[list[Variable]] = []
        for v in fresh:
            if v.dtype.kind != "f" and v.dtype.name != "bfloat16":
                raise TypeError(f"variable {v.name!r} has dtype {v.dtype} and cannot be trained")
            if v._buffer.shared:
                groups.append([v])
            else:
                together.setdefault((v.backend, v.dtype), []).append(v)
        for members in [*together.values(), *groups]:
            group = _Group(members, start, units)
            self._groups.append(group)
            self._place_of.update((v.id, (group, i)) for i, v in enumerate(group.members))
        self._move_to(fresh[0])

    def _move_to(self, like: Variable) -> None:
        """Keep hyper-parameters where the parameters are: a kernel reads them there."""
        xp = _backend.module_of((like._array,))
        for v in (*self._hyperparameters.values(), self._iterations, *self._factor):
            v._move(xp)

    def slot(self, variable: Variable, name: str) -> Tensor:
        """Return a copy of one of a variable's slots, as `"m"` and `"v"` of Adam.

        Raises `KeyError` for a variable that this optimiser has not updated, or an unknown slot.
        """
        if variable.id not in self._place_of or name not in self._SLOTS:
            raise KeyError(f"no slot {name!r} for variable {variable.name!r} in {self.name}")
        group, _ = self._place_of[variable.id]
        return Tensor(group.slot_of(variable, name, self._SLOTS.index(name)))

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={float(v):g}" for k, v in self._hyperparameters.items())
        return f"<{type(self).__name__} {settings}>"


class SGD(Optimizer):
    """Gradient descent: p -= learning_rate * g, with momentum if asked for.

    momentum  mu > 0: v = mu * v - learning_rate * g; p += v.
    nesterov  whether then p += mu * v - learning_rate * g instead (Y. Nesterov, 1983).

    Raises `ValueError` for negative numbers.

    >>> tg.optimizers.SGD(learning_rate=0.1, momentum=0.9)
    <SGD learning_rate=0.1, momentum=0.9>
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        name: str | None = None,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
    ) -> None:
        super().__init__(
            name,
            global_clipnorm=global_clipnorm,
            loss_scale_factor=loss_scale_factor,
            learning_rate=learning_rate,
            momentum=momentum,
        )
        self._nesterov = bool(nesterov)
        self._has_momentum = momentum > 0
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        if self._has_momentum:
            self._SLOTS = ("velocity",)

    def _update(
        self, p: Variable, slots: tuple[Variable, ...], g: Operand, units: dict[str, float]
    ) -> None:
        if not self._has_momentum:
            sgd_update(p, g, self._hyperparameters["learning_rate"], *self._factor)
            return
        momentum_update(p, *slots, g, *self._settings, nesterov=self._nesterov)


class Adagrad(Optimizer):
    """AdaGrad (J. Duchi, E. Hazan, Y. Singer, 2011).

    a += g**2; p -= learning_rate * g / (sqrt(a) + epsilon).

    initial_accumulator_value  where a begins.

    >>> tg.optimizers.Adagrad(learning_rate=0.1)
    <Adagrad learning_rate=0.1, epsilon=1e-07>
    """

    _SLOTS = ("accumulator",)

    def __init__(
        self,
        learning_rate: float = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: float = 1e-7,
        name: str | None = None,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
    ) -> None:
        super().__init__(
            name,
            global_clipnorm=global_clipnorm,
            loss_scale_factor=loss_scale_factor,
            learning_rate=learning_rate,
            epsilon=epsilon,
        )
        if not initial_accumulator_value >= 0:
            raise ValueError(
                "Adagrad: initial_accumulator_value must be >= 0, "
                f"got {initial_accumulator_value!r}"
            )
        self._START = (float(initial_accumulator_value),)

    def _update(
        self, p: Variable, slots: tuple[Variable, ...], g: Operand, units: dict[str, float]
    ) -> None:
        adagrad_update(p, *slots, g, *self._settings)


class RMSprop(Optimizer):
    """RMSProp (T. Tieleman, G. Hinton, 2012).

    v = rho * v + (1 - rho) * g**2; p -= learning_rate * g / (sqrt(v) + epsilon).

    >>> tg.optimizers.RMSprop()
    <RMSprop learning_rate=0.001, rho=0.9, epsilon=1e-07>
    """

    _SLOTS = ("mean_square",)
    _AVERAGES: ClassVar[dict[str, str]] = {"mean_square": "rho"}

    def __init__(
        self,
        learning_rate: float = 0.001,
        rho: float = 0.9,
        epsilon: float = 1e-7,
        name: str | None = None,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
    ) -> None:
        _below_one("RMSprop", rho=rho)
        super().__init__(
            name,
            global_clipnorm=global_clipnorm,
            loss_scale_factor=loss_scale_factor,
            learning_rate=learning_rate,
            rho=rho,
            epsilon=epsilon,
        )

    def _update(
        self, p: Variable, slots: tuple[Variable, ...], g: Operand, units: dict[str, float]
    ) -> None:
        rmsprop_update(p, *slots, g, *self._settings, **units)


class Adam(Optimizer):
    """Adam (D. P. Kingma, J. Ba, 2015), epsilon outside the root and after the bias correction.

    m = beta_1 * m + (1 - beta_1) * g; v = beta_2 * v + (1 - beta_2) * g**2;
    p -= learning_rate * (m / (1 - beta_1**t)) / (sqrt(v / (1 - beta_2**t)) + epsilon).

    Raises `ValueError` for negative numbers and for a beta that is not below 1.

    >>> tg.optimizers.Adam()
    <Adam learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-08, weight_decay=0>
    """

    _SLOTS = ("m", "v")
    _AVERAGES: ClassVar[dict[str, str]] = {"m": "beta_1", "v": "beta_2"}
    _DECAY = 0.0

    def __init__(
        self,
        learning_rate: float = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | None = None,
        name: str | None = None,
        global_clipnorm: float | None = None,
        loss_scale_factor: float | None = None,
    ) -> None:
        _below_one(type(self).__name__, beta_1=beta_1, beta_2=beta_2)
        super().__init__(
            name,
            global_clipnorm=global_clipnorm,
            loss_scale_factor=loss_scale_factor,
            learning_rate=learning_rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            weight_decay=self._DECAY if weight_decay is None else weight_decay,
        )

    def _update(
        self, p: Variable, slots: tuple[Variable, ...], g: Operand, units: dict[str, float]
    ) -> None:
        adam_update(p, *slots, g, self._iterations, *self._settings, **units)


class AdamW(Adam):
    """Adam with decoupled weight decay (I. Loshchilov, F. Hutter, 2019), 0.004 unless given.

    Before Adam's own step, p -= learning_rate * weight_decay * p.

    >>> tg.optimizers.AdamW(weight_decay=0.01).weight_decay.numpy()
    array(0.01)
    """

    _DECAY = 0.004


def _below_one(name: str, **numbers: float) -> None:
    for key, value in numbers.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {key} must be from 0 to below 1, got {value!r}")


_BY_NAME: dict[str, Callable[[], Optimizer]] = {
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adam": Adam,
    "adamw": AdamW,
}


def get(optimizer: Any) -> Optimizer:
    """Return the optimiser that a name or an `Optimizer` stands for.

    Raises `ValueError` for an unknown name.

    >>> tg.optimizers.get("sgd")
    <SGD learning_rate=0.01, momentum=0>
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, str) and optimizer.lower() in _BY_NAME:
        return _BY_NAME[optimizer.lower()]()
    names = ", ".join(_BY_NAME)
    raise ValueError(f"optimizer must be an Optimizer or one of {names}, got {optimizer!r}")
