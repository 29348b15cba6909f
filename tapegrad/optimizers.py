"""Optimisers by Keras's names: parameters and state lie flat, and one pass updates all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from tapegrad import _backend
from tapegrad._flat_parameters import Group, Run, put_in_a_row
from tapegrad._recording import no_record, state
from tapegrad._structure import flatten
from tapegrad._update_rules import (
    adagrad_update,
    adam_update,
    gather_gradients,
    gradient_factor,
    momentum_update,
    rmsprop_update,
    sgd_update,
)
from tapegrad.errors import TapeWarning
from tapegrad.linear import cast, reshape
from tapegrad.tensor import Operand, Tensor
from tapegrad.variable import Variable, assign_add


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

    # The hyper-parameters that there are only if they were given.
    _OPTIONAL: tuple[str, ...] = ("global_clipnorm", "loss_scale_factor")
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
        put_in_a_row(list(self._hyperparameters.values()))
        self._iterations = Variable(0, trainable=False, name=f"{self.name}/iterations")
        # What every gradient is multiplied by, where the settings ask for it.
        self._factor = (
            (Variable(1.0, trainable=False, dtype=np.float64, name=f"{self.name}/factor"),)
            if given
            else ()
        )
        # What the update takes, in its order.
        self._settings = (*[self._hyperparameters[key] for key in hyperparameters], *self._factor)
        self._groups: list[Group] = []
        self._place_of: dict[int, tuple[Group, int]] = {}
        self._warned: set[int] = set()
        self._known_runs: list[tuple[Run, list[int]]] = []  # of the last step's variables
        self._known_for: list[int] = []

    def __getattr__(self, name: str) -> Variable:
        found: dict[str, Variable] = self.__dict__.get("_hyperparameters", {})
        if name in found:
            return found[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_hyperparameters", ()):
            self._hyperparameters[name].assign(value)
        elif name in self._OPTIONAL:
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
    ) -> list[tuple[Run, list[int]]]:
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
        """Return what slots may be kept in: see `_update_rules`."""
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
            group = Group(members, start, units)
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

    momentum  mu > 0: v = mu * v - learning_rate * g; p += v. Made with 0 it has none to change.
    nesterov  whether then p += mu * v - learning_rate * g instead (Y. Nesterov, 1983).

    Raises `ValueError` for negative numbers.

    >>> tg.optimizers.SGD(learning_rate=0.1, momentum=0.9)
    <SGD learning_rate=0.1, momentum=0.9>
    """

    _OPTIONAL = (*Optimizer._OPTIONAL, "momentum")

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
            **({"momentum": momentum} if momentum else {}),
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
    <SGD learning_rate=0.01>
    """
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, str) and optimizer.lower() in _BY_NAME:
        return _BY_NAME[optimizer.lower()]()
    names = ", ".join(_BY_NAME)
    raise ValueError(f"optimizer must be an Optimizer or one of {names}, got {optimizer!r}")
