"""Model and Sequential: layers with `compile`, `fit`, `evaluate`, `predict` and weight files."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tapegrad import losses, optimizers
from tapegrad import metrics as metrics_module
from tapegrad._function import function
from tapegrad._recording import no_record
from tapegrad._structure import flatten, map_structure
from tapegrad.data.batches import Batches
from tapegrad.data.steps import Steps
from tapegrad.layers import Layer
from tapegrad.ops import elementwise as ew
from tapegrad.ops.arguments import as_tensor
from tapegrad.ops.creation import zeros
from tapegrad.ops.indexing import getitem
from tapegrad.tape import GradientTape
from tapegrad.tensor import Tensor, constant
from tapegrad.training.history import History
from tapegrad.training.interrupts import Interrupts
from tapegrad.training.progress import Progress
from tapegrad.variable import Variable


class Model(Layer):
    """A layer that can be trained: subclass it, override `call(x, training)`, then compile and fit.

    >>> class Line(tg.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = tg.Variable(0.0)
    ...     def call(self, x, training=False):
    ...         return self.w * x
    >>> model = Line()
    >>> model.compile(optimizer=tg.optimizers.SGD(0.1), loss="mse")
    >>> history = model.fit([[1.0], [2.0]], [[3.0], [6.0]], epochs=50, shuffle=False)
    >>> round(float(model.w), 3)
    3.0
    """

    def __init__(self, name: str | None = None, trainable: bool = True) -> None:
        super().__init__(name, trainable)
        self._compiled = False

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        metrics: Any = (),
        weighted_metrics: Any = (),
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
    ) -> None:
        """Choose how to train.

        optimizer            a name or an optimiser of `tapegrad.optimizers`.
        loss                 a name, a loss of `tapegrad.losses`, or a function of (y_true, y_pred).
        metrics              names, metrics of `tapegrad.metrics` or functions, shown beside the
                             loss.
        weighted_metrics     the same, with the examples' weights taken in.
        run_eagerly          whether `fit` runs `train_step` as it is written, in every step. By
                             default it is compiled (`tg.function`): what is no operation of
                             tapegrad, such as printing, then happens in the first steps only.
        steps_per_execution  how many steps `fit` takes at once. On a GPU they are one launch, which
                             takes the batches from arrays on the device (`tapegrad.data.Steps`).
                             The results are the same; progress and Ctrl-C come after so many steps.

        Raises `ValueError` for unknown names and for steps_per_execution < 1.
        """
        self._steps_per_execution = operator.index(steps_per_execution)
        if self._steps_per_execution < 1:
            raise ValueError(f"steps_per_execution must be at least 1, got {steps_per_execution!r}")
        self._optimizer = optimizers.get(optimizer)
        self._loss = None if loss is None else losses.get(loss)
        self._metrics = _metrics(metrics)
        self._weighted_metrics = _metrics(weighted_metrics)
        self._loss_mean = metrics_module.Mean("loss")
        self._run_eagerly = bool(run_eagerly)
        self._compiled = True

    @property
    def optimizer(self) -> optimizers.Optimizer:
        """The optimiser that `compile` was given."""
        self._check_compiled()
        return self._optimizer

    def compute_loss(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        """Return the scalar to be minimised; override it for another."""
        if self._loss is None:
            raise ValueError("compile(...) was given no loss")
        return self._loss(y_true, y_pred, sample_weight)

    def train_step(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Take one step on a batch; override it for another kind of training."""
        with GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y, y_pred, sample_weight)
        variables = self.trainable_variables
        gradients = tape.gradient(loss, variables)
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._take_in(loss, y, y_pred, sample_weight)

    def test_step(self, x: Any, y: Any, sample_weight: Any = None) -> None:
        """Take a batch into the loss and the metrics, without training."""
        y_pred = self(x, training=False)
        self._take_in(self.compute_loss(y, y_pred, sample_weight), y, y_pred, sample_weight)

    def _take_in(self, loss: Tensor, y: Any, y_pred: Any, sample_weight: Any) -> None:
        with no_record():
            shape = flatten(y_pred)[0].shape
            rows = shape[0] if shape else 1  # a model that squeezes its output, of a single row
            self._loss_mean.update_state(loss, float(rows))
            for metric in self._metrics:
                metric.update_state(y, y_pred)
            for metric in self._weighted_metrics:
                metric.update_state(y, y_pred, sample_weight)

    def _numbers(self) -> dict[str, float]:
        every: list[metrics_module.Mean] = [
            self._loss_mean,
            *self._metrics,
            *self._weighted_metrics,
        ]
        numbers: dict[str, float] = {}
        for metric in every:
            name, k = metric.name, 1
            while name in numbers:  # two of one name are both shown
                name, k = f"{metric.name}_{k}", k + 1
            numbers[name] = float(metric.result())
        return numbers

    def _reset(self) -> None:
        for metric in [self._loss_mean, *self._metrics, *self._weighted_metrics]:
            metric.reset_state()

    def fit(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        epochs: int = 1,
        verbose: int | str = "auto",
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        seed: int | None = None,
    ) -> History:
        """Train for some epochs, and return the history of losses and metrics.

        x, y              inputs and targets, arrays of equally many rows; or x alone: an iterable
                          of batches (x, y) or (x, y, sample_weight), one pass an epoch. What
                          goes with rows (weights, validation_split) is then refused.
        verbose           0, 1 (a progress line), 2 (a line an epoch); "auto" is 1 on a terminal.
        validation_split  the share of rows, the last ones, kept for validation.
        validation_data   (x, y) or (x, y, sample_weight) to evaluate on after each epoch.
        shuffle           whether rows come in a new order each epoch, drawn from `seed`, or for
                          None from the common stream (`tg.random.seed`).
        class_weight      {label: weight} for integer labels; multiplies the examples' weights.
        sample_weight     a weight for each row's loss.

        Ctrl-C ends training after the step that runs; the history then holds the finished epochs.
        Raises `RuntimeError` before `compile`, `ValueError` for unequal numbers of rows.
        """
        self._check_compiled()
        if epochs < 0:
            raise ValueError(f"epochs must be at least 0, got {epochs!r}")
        if not 0.0 <= validation_split < 1.0:
            raise ValueError(
                f"validation_split must be from 0 to below 1, got {validation_split!r}"
            )
        _are_batches(
            x,
            y,
            sample_weight=sample_weight,
            class_weight=class_weight,
            validation_split=validation_split or None,
        )
        if validation_split and validation_data is None:
            x, y, sample_weight, validation_data = _split(x, y, sample_weight, validation_split)
        if class_weight is not None:
            sample_weight = _class_weights(y, class_weight, sample_weight)
        batches = _batches(x, y, sample_weight, batch_size, shuffle, seed)
        held_out = None
        if validation_data is not None:
            given = _unpack(validation_data, "validation_data")
            held_out = _batches(*given, batch_size, False, None)
        epoch_of_steps = self._trainer(batches)
        history = History()
        progress = Progress(verbose, epochs)
        with Interrupts() as interrupts:
            for epoch in range(epochs):
                self._reset()
                progress.begin(epoch + 1, len(batches) if isinstance(batches, Batches) else None)
                done = 0
                for count in epoch_of_steps():
                    done += count
                    if interrupts.asked:
                        break
                    progress.update(done, self._numbers)
                if interrupts.asked:
                    history.interrupted = True
                    progress.say(f"interrupted in epoch {epoch + 1}: the weights are as trained")
                    break
                if not done and epoch:
                    raise ValueError(
                        f"there is no batch for epoch {epoch + 1}: a generator lasts one pass; "
                        "give a list of batches or tapegrad.data.Batches"
                    )
                if not done:
                    raise ValueError("there is no batch to train on: the data has no rows")
                numbers = self._numbers()
                if held_out is not None:
                    found = self._evaluate(held_out)
                    numbers |= {f"val_{name}": value for name, value in found.items()}
                history.append(epoch, numbers)
                progress.end(done, numbers)
                if interrupts.asked:  # while validating: this epoch is whole, the next not begun
                    history.interrupted = True
                    progress.say(f"interrupted after epoch {epoch + 1}: the weights are as trained")
                    break
        return history

    def _trainer(self, batches: Any) -> Callable[[], Iterator[int]]:
        """Return what trains for one epoch: it yields how many steps it has taken at once."""
        many = self._steps_per_execution
        # Compiled anew for each fit: layers may have been frozen since the last one.
        step = self.train_step if self._run_eagerly else function(self.train_step, strict=False)

        def one_by_one() -> Iterator[int]:
            count = 0
            for batch in batches:
                step(*_unpack(batch))
                count += 1
                if count == many:
                    yield count
                    count = 0
            if count:
                yield count

        if many == 1 or self._run_eagerly or not isinstance(batches, Batches):
            return one_by_one
        steps = _TrainSteps(step, batches, many)

        def many_at_once() -> Iterator[int]:
            for count, _ in steps.epoch():
                yield count

        return many_at_once

    def _evaluate(self, batches: Any) -> dict[str, float]:
        self._reset()
        done = 0
        for batch in batches:
            self.test_step(*_unpack(batch))
            done += 1
        if not done:
            raise ValueError("there is no batch to evaluate on: the data has no rows")
        return self._numbers()

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        batch_size: int = 32,
        sample_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """Return the loss, or with metrics a list of the loss and them, or a dict by name.

        Raises `RuntimeError` before `compile`, `ValueError` for unequal numbers of rows.
        """
        self._check_compiled()
        numbers = self._evaluate(_batches(x, y, sample_weight, batch_size, False, None))
        if return_dict:
            return numbers
        values = list(numbers.values())
        return values[0] if len(values) == 1 else values

    def predict(self, x: Any, batch_size: int = 32) -> np.ndarray[Any, Any]:
        """Return the outputs for all rows of x as a NumPy array.

        >>> model = tg.Sequential([tg.layers.Dense(2)])
        >>> model.predict(tg.ones((5, 3))).shape
        (5, 2)
        """
        outputs = [self(batch, training=False).numpy() for batch in Batches(x, batch_size)]
        if not outputs:
            return cast("np.ndarray[Any, Any]", self(as_tensor(x), training=False).numpy())
        return np.concatenate(outputs)

    def _check_compiled(self) -> None:
        if not self._compiled:
            raise RuntimeError("call compile(optimizer, loss) first")

    # ---- weights

    def _check_built(self, what: str) -> dict[str, Variable]:
        found = dict(self.named_variables())
        if not found:
            raise ValueError(
                f"{what}: the model has no variables yet; call it on a batch, or build(input_shape)"
            )
        return found

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write all Variables to a safetensors file, atomically: never half a file.

        Names are paths such as "layers.0.kernel". Raises `ValueError` where there are none.
        """
        from tapegrad import safetensors

        found = self._check_built("save_weights")
        arrays = {name: variable.numpy() for name, variable in found.items()}
        safetensors.save(path, arrays, {"format": "tapegrad"})

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Read all Variables from a safetensors file that `save_weights` wrote.

        Nothing in the file is executed, and nothing is changed unless all of it fits. Raises
        `FormatError` for a broken file, `ValueError` for names and shapes that are not the model's
        and for fractions where it has whole numbers.
        """
        from tapegrad import safetensors

        found = self._check_built("load_weights")
        arrays, _ = safetensors.load(path)
        if found.keys() != arrays.keys():
            missing = sorted(found.keys() - arrays.keys())
            extra = sorted(arrays.keys() - found.keys())
            raise ValueError(
                f"{os.fspath(path)}: the file is of another model; missing there: "
                f"{', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"
            )
        for name, variable in found.items():
            shape, dtype = variable._memory.shape, variable._memory.dtype
            if arrays[name].shape != shape:
                raise ValueError(
                    f"{os.fspath(path)}: {name} has shape {arrays[name].shape} in the file, "
                    f"{shape} in the model"
                )
            if dtype.kind in "biu" and not np.can_cast(arrays[name].dtype, dtype, "same_kind"):
                raise ValueError(
                    f"{os.fspath(path)}: {name} holds {arrays[name].dtype} in the file, "
                    f"{dtype} in the model"
                )
        for name, variable in found.items():
            variable.assign(constant(arrays[name].astype(variable._memory.dtype)))

    def get_weights(self) -> list[np.ndarray[Any, Any]]:
        """Return the values of all Variables, as NumPy arrays."""
        return [variable.numpy() for variable in self.variables]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all Variables, in the order of `get_weights`.

        Nothing is changed unless all of it fits. Raises `ValueError` for another number of weights
        and for other shapes.
        """
        found = dict(self.named_variables())
        if len(weights) != len(found):
            raise ValueError(f"{len(weights)} weights for {len(found)} variables")
        values = [as_tensor(value) for value in weights]
        for (name, variable), value in zip(found.items(), values, strict=True):
            shape = variable._memory.shape
            if value.shape != shape:
                raise ValueError(f"{name} has shape {shape}, its weights have {value.shape}")
        for variable, value in zip(found.values(), values, strict=True):
            variable.assign(value)

    def summary(self, print_fn: Callable[[str], None] = print) -> None:
        """Print a table of the layers, their output shapes and numbers of parameters.

        Raises `ValueError` for a model that is not built.
        """
        self._check_built("summary")
        rows = [("Layer (type)", "Output shape", "Parameters")]
        for layer in self.sublayers():
            shape = "(" + ", ".join(["None", *map(str, layer.output_shape[1:])]) + ")"
            title = f"{layer.name} ({type(layer).__name__})"
            frozen = "" if layer.trainable else " (frozen)"
            rows.append((title, shape, f"{layer.count_params():,}{frozen}"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        line = "─" * (sum(widths) + 4)
        print_fn(f'Model "{self.name}"')
        print_fn(line)
        for i, row in enumerate(rows):
            print_fn("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
            if i == 0:
                print_fn(line)
        print_fn(line)
        trainable = sum(v.size for v in self.trainable_variables)
        total = self.count_params()
        size = sum(v.nbytes for v in self.variables)
        print_fn(f"Parameters: {total:,} ({size / 2**10:.1f} KiB), {trainable:,} of them trainable")


class _TrainSteps(Steps):
    """Steps of a model: `train_step` is given a batch's weights too, None where there are none."""

    def _arguments(self, order: Tensor | None, i: int) -> tuple[Any, ...]:
        return _unpack(super()._arguments(order, i))


class Sequential(Model):
    """Layers one after the other.

    layers  a list; more can be added with `add`.

    Raises `TypeError` for what is no Layer.

    >>> model = tg.Sequential([tg.layers.Dense(8, activation="relu"), tg.layers.Dense(2)])
    >>> model(tg.ones((1, 4))).shape
    (1, 2)
    """

    def __init__(self, layers: Iterable[Layer] = (), name: str | None = None) -> None:
        super().__init__(name)
        self.layers: list[Layer] = []
        for layer in layers:
            self.add(layer)

    def add(self, layer: Layer) -> None:
        """Add a layer at the end."""
        if not isinstance(layer, Layer):
            raise TypeError(f"a Sequential holds layers, got {layer!r}")
        taken = {other.name for other in self.layers}
        if layer.name in taken and layer not in self.layers:
            layer.name = next(
                name for i in range(1, len(taken) + 2) if (name := f"{layer.name}_{i}") not in taken
            )
        self.layers.append(layer)

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Make all Variables, for inputs (batch, ...) of this shape; the batch may be None.

        Raises `ValueError` where another length is None.
        """
        if self.built:
            return
        if None in input_shape[1:]:
            raise ValueError(
                f"{self.name}: only the batch may be None in an input shape, "
                f"got {tuple(input_shape)}"
            )
        self.built = True
        if not any(isinstance(length, tuple) for length in input_shape):  # shapes of a structure
            lengths = [1 if n is None else int(n) for n in input_shape]
            if len(lengths) > 1:  # a vector may be one example: its length is what layers need
                lengths[0] = 1
            with no_record():
                self(zeros(lengths))

    def call(self, x: Any, training: bool = False) -> Any:
        """Return what the last layer makes of it."""
        for layer in self.layers:
            x = layer(x, training=training)
        return x


def _metrics(given: Any) -> list[metrics_module.Metric]:
    return [metrics_module.get(m) for m in (given if isinstance(given, (list, tuple)) else [given])]


def _are_batches(x: Any, y: Any, **of_rows: Any) -> bool:
    """Tell whether x is an iterable of batches, which refuses what goes with rows of arrays."""
    if y is not None or isinstance(x, (Tensor, np.ndarray)) or not isinstance(x, Iterable):
        return False
    for name, value in of_rows.items():
        if value is not None:
            raise ValueError(
                f"{name} goes with arrays x and y: x is an iterable of batches, each of which is "
                "(x, y) or (x, y, sample_weight)"
            )
    return True


def _batches(
    x: Any, y: Any, sample_weight: Any, batch_size: int, shuffle: bool, seed: int | None
) -> Any:
    """Return an iterable of batches, one pass of which is an epoch."""
    if _are_batches(x, y, sample_weight=sample_weight):
        return x
    if y is None:
        raise ValueError("targets y are missing")
    given = (x, y) if sample_weight is None else (x, y, sample_weight)
    return Batches(given, batch_size, shuffle=shuffle, seed=seed)


def _unpack(batch: Any, what: str = "a batch") -> tuple[Any, Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            f"{what} is (x, y) or (x, y, sample_weight), got a {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    x, y = batch[:2]
    return x, y, batch[2] if len(batch) == 3 else None


def _split(x: Any, y: Any, sample_weight: Any, share: float) -> tuple[Any, Any, Any, Any]:
    """Keep the last rows for validation."""
    whole = _batches(x, y, sample_weight, 1, False, None)
    cut = whole.rows - int(whole.rows * share)
    if not 0 < cut < whole.rows:
        raise ValueError(
            f"validation_split={share} leaves nothing of {whole.rows} rows on one side"
        )

    def part(rows: slice) -> Any:
        return map_structure(lambda array: getitem(array, rows), whole._arrays)

    return (*_unpack(part(slice(cut))), part(slice(cut, None)))


def _class_weights(y: Any, weights: Mapping[int, float], sample_weight: Any) -> Tensor:
    if not isinstance(weights, Mapping) or not all(
        isinstance(label, (int, np.integer)) for label in weights
    ):
        raise TypeError(f"class_weight must be a dict {{label: weight}}, got {weights!r}")
    labels = as_tensor(y)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"class_weight needs integer labels, got {labels.dtype}")
    if labels.shape not in ((labels.size,), (labels.size, 1)):
        raise ValueError(f"class_weight needs one label a row, got labels of shape {labels.shape}")
    present, places = np.unique(labels.numpy().reshape(-1), return_inverse=True)
    table = np.array([weights.get(int(label), 1.0) for label in present], np.float32)
    each = as_tensor(table[places])
    return each if sample_weight is None else ew.multiply(each, as_tensor(sample_weight))
