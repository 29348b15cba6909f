"""Layers by Keras's names: Dense, Dropout, and the Layer that they and a user's own build on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

from tapegrad import initializers, nn
from tapegrad._structure import flatten
from tapegrad.ops.arguments import as_tensor
from tapegrad.ops.elementwise import astype
from tapegrad.random import Generator
from tapegrad.tensor import DEFAULT_FLOAT, ArrayLike, Tensor
from tapegrad.variable import Variable

ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda x: as_tensor(x),
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "selu": nn.selu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "swish": nn.silu,
    "sigmoid": nn.sigmoid,
    "log_sigmoid": nn.log_sigmoid,
    "tanh": nn.tanh,
    "softplus": nn.softplus,
    "softsign": nn.softsign,
    "softmax": nn.softmax,
    "log_softmax": nn.log_softmax,
}


def _activation(activation: Any) -> tuple[str, Callable[[Any], Tensor]]:
    """Return an activation's name and function."""
    if activation is None:
        return "linear", ACTIVATIONS["linear"]
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return activation, ACTIVATIONS[activation]
    for name, function in ACTIVATIONS.items():
        if activation is function:
            return name, function
    if callable(activation):
        return getattr(activation, "__name__", "custom"), activation
    names = ", ".join(ACTIVATIONS)
    raise ValueError(f"activation must be a function or one of {names}, got {activation!r}")


class Layer:
    """Something that computes with Variables of its own.

    A subclass overrides `call(x, training)`, and `build(input_shape)` to make its Variables when
    the shape of the input is first known. Variables and layers in attributes, and in lists, tuples
    and dicts there, are found by themselves.

    trainable  False freezes the layer: its Variables are in no `trainable_variables`.
    """

    def __init__(self, name: str | None = None, trainable: bool = True) -> None:
        self.name = name or _snake_case(type(self).__name__)
        self.trainable = trainable
        self.built = False
        self.output_shape: tuple[int, ...] = ()  # of the last call

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Make the Variables for inputs of this shape, whose first length is the batch's."""

    def call(self, x: Any, training: bool = False) -> Any:
        """Compute the output. `training` says whether dropout and its like are on."""
        raise NotImplementedError(f"{type(self).__name__} must override call(x, training)")

    def __call__(self, x: Any, training: bool = False) -> Any:
        """Build the layer if it is not yet, and compute the output."""
        if not isinstance(x, (list, tuple, dict)) or _is_numbers(x):
            x = as_tensor(x)
        if not self.built:
            self.build(x.shape if isinstance(x, Tensor) else tuple(v.shape for v in flatten(x)))
            self.built = True
        y = self.call(x, training=training)
        self.output_shape = getattr(y, "shape", ())
        return y

    def sublayers(self) -> list[Layer]:
        """Return the layers in this one's attributes."""
        return [child for _, child in _children(self) if isinstance(child, Layer)]

    def named_variables(self, prefix: str = "") -> Iterator[tuple[str, Variable]]:
        """Yield (path, variable), each variable once: `("layers.0.kernel", <tg.Variable ...>)`."""
        yield from _named(self, prefix, set(), only_trainable=False)

    @property
    def variables(self) -> list[Variable]:
        """All Variables, of sublayers too, each once."""
        return [variable for _, variable in self.named_variables()]

    @property
    def trainable_variables(self) -> list[Variable]:
        """The trainable Variables of layers that are not frozen, each once."""
        return [v for _, v in _named(self, "", set(), only_trainable=True)]

    @property
    def trainable_parameters(self) -> list[Variable]:
        """Another name of `trainable_variables`."""
        return self.trainable_variables

    @property
    def weights(self) -> list[Variable]:
        """Another name of `variables`."""
        return self.variables

    def count_params(self) -> int:
        """Return how many numbers the Variables hold."""
        return sum(variable.size for variable in self.variables)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


def _is_numbers(x: Any) -> bool:
    return bool(x) and all(isinstance(leaf, (int, float)) for leaf in flatten(x))


def _snake_case(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


# What most attributes are: a training step asks for its variables, and need not look at these.
_PLAIN = frozenset((bool, int, float, str, type(None), type(_snake_case)))


def _children(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, child) for the Variables and Layers in an object's attributes."""
    for name, value in vars(owner).items():
        if type(value) not in _PLAIN:
            yield from _found(name, value)


def _found(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Variable, Layer)):
        yield path, value
    elif isinstance(value, dict):
        for key, child in value.items():
            plain = isinstance(key, str) and "." not in key and not key.startswith("[")
            yield from _found(f"{path}.{key}" if plain else f"{path}.[{key!r}]", child)
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield from _found(f"{path}.{i}", child)


def _named(
    layer: Layer, prefix: str, seen: set[int], only_trainable: bool
) -> Iterator[tuple[str, Variable]]:
    if only_trainable and not layer.trainable:
        return
    for path, child in _children(layer):
        if id(child) in seen:
            continue
        seen.add(id(child))
        if isinstance(child, Layer):
            yield from _named(child, f"{prefix}{path}.", seen, only_trainable)
        elif child.trainable or not only_trainable:
            yield prefix + path, child


class Dense(Layer):
    """A fully connected layer: activation(x @ kernel + bias), with relu fused.

    units               the number of outputs.
    activation          a name (`"relu"`, `"softmax"`, ...), a function, or None.
    use_bias            whether a bias is added.
    kernel_initializer  a name (`"glorot_uniform"`, `"he_normal"`, ...) or a function of
                        (shape, dtype); see `tapegrad.initializers`.
    bias_initializer    likewise.
    dtype               of the Variables.

    Input (..., inputs), output (..., units). Raises `ValueError` for unknown names, for units < 1,
    and for inputs of another width than the layer was built for.

    >>> layer = tg.layers.Dense(3, activation="relu")
    >>> layer(tg.ones((2, 4))).shape
    (2, 3)
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        name: str | None = None,
        dtype: Any = DEFAULT_FLOAT,
    ) -> None:
        super().__init__(name)
        try:
            self.units = operator.index(units)
        except TypeError:
            raise TypeError(f"Dense: units must be an integer, got {units!r}") from None
        if self.units < 1:
            raise ValueError(f"Dense: units must be at least 1, got {units!r}")
        self.activation_name, self.activation = _activation(activation)
        self.use_bias = use_bias
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.dtype = dtype
        self.kernel: Variable | None = None
        self.bias: Variable | None = None

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Make kernel (inputs, units) and bias (units,)."""
        if not input_shape or isinstance(input_shape[0], tuple):
            got = f"{len(input_shape)} tensors" if input_shape else "a 0-d tensor"
            raise ValueError(f"{self.name}: the input must be (..., inputs), got {got}")
        kernel = self.kernel_initializer((input_shape[-1], self.units), self.dtype)
        self.kernel = Variable(kernel, name=f"{self.name}/kernel")
        if self.use_bias:
            bias = self.bias_initializer((self.units,), self.dtype)
            self.bias = Variable(bias, name=f"{self.name}/bias")

    def call(self, x: Any, training: bool = False) -> Tensor:
        """Return activation(x @ kernel + bias)."""
        kernel = self.kernel
        assert kernel is not None
        if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
            raise ValueError(
                f"{self.name} was built for inputs (..., {kernel.shape[0]}), got shape {x.shape}"
            )
        if x.dtype != kernel.dtype:
            x = astype(x, kernel.dtype)  # images come as uint8, NumPy's data as float64
        if self.activation is nn.relu:
            return nn.linear_relu(x, kernel, self.bias)
        return self.activation(nn.linear(x, kernel, self.bias))


class Dropout(Layer):
    """While training, set elements to 0 with probability `rate`, and divide the rest by 1 - rate.

    seed  None draws from the common stream (`tg.random.seed`); a number makes one of its own.

    Raises `ValueError` for a rate outside 0 <= rate < 1.

    >>> print(tg.layers.Dropout(0.5)([1.0, 2.0]))
    tg.Tensor([1. 2.], shape=(2,), dtype=float32)
    """

    def __init__(self, rate: float, seed: int | None = None, name: str | None = None) -> None:
        super().__init__(name)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"Dropout: rate must be at least 0 and below 1, got {rate!r}")
        self.rate = rate
        self.generator = None if seed is None else Generator(seed)

    def call(self, x: ArrayLike, training: bool = False) -> Tensor:
        """Return x, with elements dropped while training."""
        if not training:
            return as_tensor(x)
        return nn.dropout(x, self.rate, generator=self.generator)
