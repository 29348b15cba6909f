"""Layers and models as a Keras user knows them: build, compile, fit, evaluate, predict, weights."""

import copy
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from scipy import special

import tapegrad as tg
from tapegrad import safetensors
from tapegrad.data import Batches
from tapegrad.layers import ACTIVATIONS, Dense, Dropout, Layer
from tapegrad.training import progress as progress_module
from tapegrad.training.progress import Progress

RNG = np.random.default_rng(0)


def blobs(n=40, features=3, classes=4, seed=0):
    """Rows around one centre for each class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(scale=3.0, size=(classes, features))
    return centres[y] + rng.normal(size=(n, features)), y


def classifier(*, hidden=8, classes=4, seed=0, dtype=np.float64):
    tg.random.seed(seed)
    model = tg.Sequential([Dense(hidden, "relu", dtype=dtype), Dense(classes, dtype=dtype)])
    model.build((None, 3))
    return model


def from_logits():
    return tg.losses.SparseCategoricalCrossentropy(from_logits=True)


# ---- Dense

PLAIN = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.minimum(np.maximum(x, 0), 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "elu": lambda x: np.where(x > 0, x, np.exp(x) - 1),
    "selu": lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * (np.exp(x) - 1)),
    "gelu": lambda x: x * special.ndtr(x),
    "silu": lambda x: x * special.expit(x),
    "swish": lambda x: x * special.expit(x),
    "sigmoid": special.expit,
    "log_sigmoid": special.log_expit,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softmax": lambda x: special.softmax(x, -1),
    "log_softmax": lambda x: special.log_softmax(x, -1),
}


def test_every_activation_name_is_tested():
    assert set(PLAIN) == set(ACTIVATIONS)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_dense_by_activation_name(name, use_bias):
    layer = Dense(5, name, use_bias=use_bias, bias_initializer="ones", dtype=np.float64)
    x = RNG.normal(scale=3.0, size=(7, 4))
    y = layer(x)
    linear = x @ layer.kernel.numpy() + (1.0 if use_bias else 0.0)
    np.testing.assert_allclose(y, PLAIN[name](linear), rtol=1e-12, atol=1e-13)
    assert len(layer.variables) == 1 + use_bias
    assert (layer.bias is not None) == use_bias
    np.testing.assert_array_equal(layer(x), y)


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("linear", "swish")])
def test_dense_by_activation_function(name):
    by_name = Dense(3, name, kernel_initializer=tg.initializers.he_normal(1))
    by_function = Dense(3, getattr(tg.nn, name), kernel_initializer=tg.initializers.he_normal(1))
    assert by_function.activation_name == name
    x = RNG.normal(size=(2, 4))
    np.testing.assert_array_equal(by_name(x), by_function(x))


def test_dense_with_a_function_of_ones_own():
    layer = Dense(3, lambda x: x * x - 1.0, dtype=np.float64)
    x = RNG.normal(size=(2, 4))
    y = layer(x)
    np.testing.assert_allclose(y, (x @ layer.kernel.numpy()) ** 2 - 1.0, rtol=1e-12)
    none = Dense(3, None)
    assert none.activation_name == "linear"


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (0, 4)])
def test_dense_takes_any_number_of_axes(shape, activation):
    layer = Dense(6, activation, dtype=np.float64)
    x = RNG.normal(size=shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 6)
    plain = PLAIN[activation or "linear"]
    np.testing.assert_allclose(y, plain(x @ layer.kernel.numpy()), rtol=1e-12, atol=1e-13)
    assert layer.output_shape == y.shape


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64", "bool"])
def test_dense_casts_its_input_to_its_own_type(dtype):
    x = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    layer = Dense(2, "relu")
    y = layer(x)
    assert y.dtype == layer.kernel.dtype == np.float32
    plain = np.maximum(x.astype(np.float64) @ layer.kernel.numpy(), 0)
    np.testing.assert_allclose(y, plain, rtol=1e-6)
    assert layer(x.tolist()).dtype == np.float32


def test_gradients_flow_through_the_cast():
    x = tg.Variable(RNG.normal(size=(2, 3)))  # float64
    layer = Dense(2)
    with tg.GradientTape() as tape:
        y = tg.sum(layer(x))
    gradient = tape.gradient(y, x)
    assert gradient.dtype == np.float64
    np.testing.assert_allclose(gradient, np.tile(layer.kernel.numpy().sum(1), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(2, 5), (2,), (3, 3, 1)])
def test_inputs_of_another_width(shape, activation):
    layer = Dense(2, activation, name="narrow")
    layer(np.ones((1, 4)))
    message = rf"narrow was built for inputs \(\.\.\., 4\), got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Dense(0), ValueError, "Dense: units must be at least 1, got 0"),
        (lambda: Dense(-2), ValueError, "Dense: units must be at least 1, got -2"),
        (lambda: Dense(2.5), TypeError, r"Dense: units must be an integer, got 2\.5"),
        (lambda: Dense("8"), TypeError, "Dense: units must be an integer, got '8'"),
        (lambda: Dense(2, "rleu"), ValueError, "activation must be a function or one of .*'rleu'"),
        (lambda: Dense(2, 3), ValueError, "activation must be a function or one of linear, relu"),
        (
            lambda: Dense(2, kernel_initializer="he"),
            ValueError,
            "initializer must be a function or one of he_normal, .* got 'he'",
        ),
        (
            lambda: Dense(2, bias_initializer=0.0),
            ValueError,
            r"initializer must be a function or one of .* got 0\.0",
        ),
        (lambda: Dense(2)(1.0), ValueError, r"the input must be \(\.\.\., inputs\), got a 0-d"),
        (
            lambda: tg.Sequential([Dense(2)])([tg.ones((3, 2)), tg.ones((3, 2))]),
            ValueError,
            r"the input must be \(\.\.\., inputs\), got 2 tensors",
        ),
        (lambda: Dropout(1.0), ValueError, r"Dropout: rate must be at least 0 and below 1, got 1"),
        (lambda: Dropout(-0.1), ValueError, r"Dropout: rate must be .* got -0\.1"),
        (lambda: Dropout(float("nan")), ValueError, "Dropout: rate must be .* got nan"),
        (lambda: tg.nn.dropout([1.0], 1.5), ValueError, r"\[dropout\] rate must be .* got 1\.5"),
        (lambda: Layer()(1.0), NotImplementedError, r"Layer must override call\(x, training\)"),
        (lambda: tg.Sequential([3]), TypeError, "a Sequential holds layers, got 3"),
    ],
)
def test_what_layers_refuse(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


# ---- initialisers

FANS = {"fan_in": 300, "fan_out": 500, "fan_avg": 400}


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("he_normal", 2 / 300),
        ("he_uniform", 2 / 300),
        ("glorot_normal", 2 / 800),
        ("glorot_uniform", 2 / 800),
        ("lecun_normal", 1 / 300),
        ("lecun_uniform", 1 / 300),
    ],
)
def test_the_variance_of_initializers(name, variance):
    x = getattr(tg.initializers, name)(seed=0)((300, 500), np.float64).numpy()
    # 150,000 samples: five standard errors of mean and variance (kurtosis at most 3).
    assert abs(x.mean()) < 5 * np.sqrt(variance / x.size)
    assert x.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / x.size))
    bound = np.sqrt(3 * variance)
    if name.endswith("uniform"):
        assert 0.999 * bound < np.abs(x).max() <= bound
        assert (x**4).mean() / variance**2 == pytest.approx(1.8, rel=0.02)
    else:
        assert (x**4).mean() / variance**2 == pytest.approx(3.0, rel=0.06)


@pytest.mark.parametrize("mode", FANS)
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_variance_scaling(mode, distribution):
    x = tg.initializers.VarianceScaling(0.5, mode, distribution, seed=1)((300, 500)).numpy()
    assert x.var() == pytest.approx(0.5 / FANS[mode], rel=5 * np.sqrt(2 / x.size))
    assert x.dtype == np.float32


def test_initializers_and_seeds():
    one, two = tg.initializers.he_normal(seed=3), tg.initializers.he_normal(seed=4)
    np.testing.assert_array_equal(one((2, 3)), one((2, 3)))
    assert (one((2, 3)).numpy() != two((2, 3)).numpy()).all()
    tg.random.seed(0)
    free = tg.initializers.he_normal()
    first, second = free((2, 3)), free((2, 3))
    assert (first.numpy() != second.numpy()).all()
    tg.random.seed(0)
    np.testing.assert_array_equal(tg.initializers.get("he_normal")((2, 3)), first)
    tg.random.seed(0)
    np.testing.assert_array_equal(tg.initializers.get(tg.initializers.he_normal)((2, 3)), first)


def test_constant_initializers():
    np.testing.assert_array_equal(tg.initializers.get("zeros")((2,)), [0, 0])
    np.testing.assert_array_equal(tg.initializers.get("ones")((2,), np.float64), [1, 1])
    np.testing.assert_array_equal(tg.initializers.constant(2.5)((1, 2)), [[2.5, 2.5]])
    assert tg.initializers.get(tg.initializers.zeros)((2,)).tolist() == [0, 0]
    for wrong in (tg.initializers.VarianceScaling, "zero", 3):
        with pytest.raises(ValueError, match=r"initializer must be a function or one of .* got"):
            tg.initializers.get(wrong)
    layer = Dense(2, kernel_initializer=lambda shape, dtype: np.full(shape, 3.0, dtype))
    layer(np.ones((1, 4)))
    np.testing.assert_array_equal(layer.kernel, np.full((4, 2), 3.0))


def test_what_variance_scaling_refuses():
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale must be above 0, got"):
            tg.initializers.VarianceScaling(scale)
    with pytest.raises(ValueError, match="mode must be 'fan_in', 'fan_out' or 'fan_avg', got 'in'"):
        tg.initializers.VarianceScaling(1.0, "in")
    with pytest.raises(ValueError, match="distribution must be 'normal' or 'uniform', got 'gauss'"):
        tg.initializers.VarianceScaling(1.0, "fan_in", "gauss")


# ---- Dropout


def test_dropout_while_training():
    tg.random.seed(0)
    x = np.full((400, 500), 2.0)
    y = Dropout(0.3)(x, training=True).numpy()
    dropped = y == 0
    np.testing.assert_allclose(y[~dropped], 2.0 / 0.7, rtol=1e-12)
    assert dropped.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / x.size))
    # In every row and column: the mask is one of elements.
    assert (dropped.mean(0) > 0.15).all()
    assert (dropped.mean(1) < 0.45).all()


def test_dropout_otherwise_does_nothing():
    x = RNG.normal(size=(3, 4))
    layer = Dropout(0.9)
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer(x, training=False), x)
    np.testing.assert_array_equal(Dropout(0.0)(x, training=True), x)
    assert layer.variables == []


def test_the_gradient_of_dropout_is_its_mask():
    x = tg.Variable(np.full((20, 20), 3.0))
    with tg.GradientTape() as tape:
        y = Dropout(0.25, seed=1)(x, training=True)
        total = tg.sum(y)
    np.testing.assert_allclose(tape.gradient(total, x), y.numpy() / 3.0, rtol=1e-12)


def test_dropout_and_seeds():
    x = np.ones((10, 10))
    layer = Dropout(0.5, seed=3)
    first, second = layer(x, training=True), layer(x, training=True)
    assert (first.numpy() != second.numpy()).any()
    again = Dropout(0.5, seed=3)
    np.testing.assert_array_equal(again(x, training=True), first)
    np.testing.assert_array_equal(again(x, training=True), second)
    tg.random.seed(5)
    common = Dropout(0.5)(x, training=True)
    layer(x, training=True)  # draws from a stream of its own
    tg.random.seed(5)
    np.testing.assert_array_equal(Dropout(0.5)(x, training=True), common)


# ---- Sequential, Model, their variables


def test_sequential_is_one_layer_after_the_other():
    first, second = Dense(5, "tanh"), Dense(2)
    model = tg.Sequential([first])
    model.add(second)
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_array_equal(model(x), second(first(x)))
    assert model.layers == [first, second]
    assert model.variables == [first.kernel, first.bias, second.kernel, second.bias]
    assert model.count_params() == 3 * 5 + 5 + 5 * 2 + 2


def test_sequential_passes_training_on():
    model = tg.Sequential([Dropout(0.5), tg.Sequential([Dropout(0.5)])])
    x = np.ones((40, 40))
    np.testing.assert_array_equal(model(x), x)
    y = model(x, training=True).numpy()
    assert set(np.unique(y)) == {0.0, 4.0}
    assert (y == 4.0).mean() == pytest.approx(0.25, abs=0.1)


def test_layers_built_inside_the_tapes_block():
    model = tg.Sequential([Dense(5, "relu"), Dropout(0.5), Dense(2)])
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    with tg.GradientTape() as tape:
        loss = tg.sum(model(x) ** 2)
    assert len(model.trainable_variables) == 4
    gradients = tape.gradient(loss, model.trainable_variables)
    w, b, v, c = (variable.numpy() for variable in model.variables)
    h = np.maximum(x @ w + b, 0)
    y = h @ v + c
    back = (2 * y) @ v.T * (h > 0)
    plain = [x.T @ back, back.sum(0), h.T @ (2 * y), (2 * y).sum(0)]
    for gradient, expected in zip(gradients, plain, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    assert set(tape.watched_variables()) == set(model.variables)


def test_building_takes_nothing_from_dropouts_stream():
    tg.random.seed(0)
    built = tg.Sequential([Dense(5), Dropout(0.5)])
    built.build((None, 3))
    x = np.ones((4, 3))
    first = built(x, training=True)
    tg.random.seed(0)
    np.testing.assert_array_equal(tg.Sequential([Dense(5), Dropout(0.5)])(x, training=True), first)


def test_build_takes_the_shape_only():
    model = tg.Sequential([Dense(5), Dense(2)])
    model.build((None, 3))
    assert [v.shape for v in model.variables] == [(3, 5), (5,), (5, 2), (2,)]
    kept = model.get_weights()
    model.build((None, 3))
    model(np.ones((7, 3)))
    for before, after in zip(kept, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_model_may_see_a_single_example_first():
    """It was built for inputs of one number, and good for nothing else."""
    model = tg.Sequential([Dense(5, activation="relu"), Dense(2)])
    assert model(np.ones(3)).shape == (2,)
    assert [v.shape for v in model.variables] == [(3, 5), (5,), (5, 2), (2,)]
    assert model(np.ones((7, 3))).shape == (7, 2)


def test_build_needs_every_length_but_the_batchs():
    # The layers were made for inputs of one number.
    model = tg.Sequential([Dense(5)])
    with pytest.raises(ValueError, match=r"only the batch may be None .*, got \(None, None\)"):
        model.build((None, None))
    model.build((None, 3))
    assert model.variables[0].shape == (3, 5)


def test_a_sequence_that_begins_with_a_structure():
    class Joined(Layer):
        def call(self, x, training=False):
            return tg.concat([x["a"], x["b"]], axis=-1)

    model = tg.Sequential([Joined(), Dense(2)])
    assert model({"a": np.ones((4, 1)), "b": np.ones((4, 2))}).shape == (4, 2)
    assert model.variables[0].shape == (3, 2)


class Residual(tg.Model):
    """Two layers in a dict, one in a list, a variable of its own, and a skip."""

    def __init__(self):
        super().__init__()
        self.scale = tg.Variable(0.5, name="scale")
        self.fixed = tg.Variable(2.0, trainable=False, name="fixed")
        self.parts = {"inner": Dense(3, "tanh"), "more": [Dense(3, use_bias=False)]}
        self.block = tg.Sequential([Dense(2)])

    def call(self, x, training=False):
        y = self.parts["inner"](x)
        y = self.parts["more"][0](y) * self.scale * self.fixed + x
        return self.block(y, training=training)


PATHS = [
    "scale",
    "fixed",
    "parts.inner.kernel",
    "parts.inner.bias",
    "parts.more.0.kernel",
    "block.layers.0.kernel",
    "block.layers.0.bias",
]


def test_variables_are_found_by_themselves():
    model = Residual()
    model(np.ones((2, 3), np.float32))
    assert [path for path, _ in model.named_variables()] == PATHS
    assert model.trainable_variables == [v for v in model.variables if v is not model.fixed]
    assert model.trainable_parameters == model.trainable_variables
    assert model.weights == model.variables
    assert model.count_params() == 1 + 1 + 9 + 3 + 9 + 6 + 2


def test_no_two_variables_have_one_path():
    class Model(tg.Model):
        def __init__(self):
            super().__init__()
            self.w = tg.Variable(1.0)
            self._w = tg.Variable(2.0)
            self.parts = {"a.b": tg.Variable(3.0), "a": {"b": tg.Variable(4.0)}}
            self.others = {1: tg.Variable(5.0), "[1]": tg.Variable(6.0), "1": tg.Variable(7.0)}

    paths = [path for path, _ in Model().named_variables()]
    assert len(paths) == 7
    assert len(set(paths)) == 7


def test_weights_of_like_named_attributes_are_all_saved(tmp_path):
    class Model(tg.Model):
        def __init__(self, *values):
            super().__init__()
            self.w, self._w = (tg.Variable(value) for value in values)

    Model(1.0, 2.0).save_weights(tmp_path / "w")
    other = Model(0.0, 0.0)
    other.load_weights(tmp_path / "w")
    assert [float(v) for v in other.variables] == [1.0, 2.0]


def test_a_shared_layer_counts_once():
    shared = Dense(3)
    model = tg.Sequential([shared, Dense(3), shared])
    x = RNG.normal(size=(2, 3)).astype(np.float32)
    y = model(x)
    assert len(model.variables) == 4
    assert [path for path, _ in model.named_variables()] == [
        "layers.0.kernel",
        "layers.0.bias",
        "layers.1.kernel",
        "layers.1.bias",
    ]
    w, v = shared.kernel.numpy(), model.layers[1].kernel.numpy()
    np.testing.assert_allclose(y, x @ w @ v @ w, rtol=1e-4, atol=1e-5)
    with tg.GradientTape() as tape:
        loss = tg.sum(model(x))
    # d/dw of sum(x w v w): both places count.
    ones = np.ones((2, 3), np.float32)
    expected = x.T @ ones @ w.T @ v.T + (x @ w @ v).T @ ones
    np.testing.assert_allclose(tape.gradient(loss, shared.kernel), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_of_two_models():
    shared = Dense(3)
    one, two = tg.Sequential([shared, Dense(2)]), tg.Sequential([shared, Dense(4)])
    x = np.ones((1, 5), np.float32)
    one(x)
    two(x)
    assert one.variables[:2] == two.variables[:2]
    one.variables[0].assign(np.zeros((5, 3), np.float32))
    np.testing.assert_array_equal(two.variables[0], np.zeros((5, 3)))
    shared.trainable = False
    assert len(one.trainable_variables) == len(two.trainable_variables) == 2


def test_freezing():
    model = Residual()
    model(np.ones((2, 3), np.float32))
    model.parts["inner"].trainable = False
    frozen = {id(v) for v in model.parts["inner"].variables}
    assert not frozen & {id(v) for v in model.trainable_variables}
    assert len(model.trainable_variables) == 4
    assert len(model.variables) == 7
    model.block.trainable = False  # a model inside freezes all of its layers
    assert [v.shape for v in model.trainable_variables] == [(), (3, 3)]
    model.trainable = False
    assert model.trainable_variables == []
    model.trainable = True
    model.block.trainable = True
    model.parts["inner"].trainable = True
    assert len(model.trainable_variables) == 6
    assert model.variables[0].trainable


def test_names_of_layers_in_a_sequential():
    model = tg.Sequential([Dense(1), Dense(1), Dropout(0.5), Dense(1, name="out")])
    assert [layer.name for layer in model.layers] == ["dense", "dense_1", "dropout", "out"]
    assert repr(model.layers[1]) == "<Dense dense_1>"
    assert model.name == "sequential"


def test_a_model_of_structures():
    class Sum(tg.Model):
        def __init__(self):
            super().__init__()
            self.left, self.right = Dense(1, dtype=np.float64), Dense(1, dtype=np.float64)

        def call(self, x, training=False):
            return self.left(x["a"]) + self.right(x["b"])

    a, b = RNG.normal(size=(12, 2)), RNG.normal(size=(12, 3))
    y = a @ [[1.0], [2.0]] + b @ [[3.0], [-1.0], [0.5]]
    model = Sum()
    model.compile(tg.optimizers.Adam(0.1), "mse")
    history = model.fit({"a": a, "b": b}, y, batch_size=5, epochs=200, seed=0)
    assert history.history["loss"][-1] < 1e-3
    np.testing.assert_allclose(model.left.kernel, [[1.0], [2.0]], atol=0.1)
    assert model.predict({"a": a, "b": b}, batch_size=5).shape == (12, 1)


# ---- summary


def test_summary():
    model = tg.Sequential([Dense(256), Dropout(0.5), Dense(10)], name="digits")
    model.layers[2].trainable = False
    model.build((None, 64))
    lines = []
    model.summary(print_fn=lines.append)
    rule = "─" * (len("dropout (Dropout)") + 2 + len("Output shape") + 2 + len("2,570 (frozen)"))
    assert lines == [
        'Model "digits"',
        rule,
        "Layer (type)       Output shape  Parameters",
        rule,
        "dense (Dense)      (None, 256)   16,640",
        "dropout (Dropout)  (None, 256)   0",
        "dense_1 (Dense)    (None, 10)    2,570 (frozen)",
        rule,
        "Parameters: 19,210 (75.0 KiB), 16,640 of them trainable",  # 19,210 * 4 / 1024
    ]


def test_summary_is_printed(capsys):
    model = tg.Sequential([Dense(2)])
    with pytest.raises(ValueError, match=r"summary: the model has no variables yet; call it on a"):
        model.summary()
    model(np.ones((3, 4)))
    model.summary()
    assert "dense (Dense)  (None, 2)     10\n" in capsys.readouterr().out


# ---- compile, fit, evaluate, predict


class Watch(tg.Model):
    """Keeps what every call is given; its one weight does not matter."""

    def __init__(self):
        super().__init__()
        self.w = tg.Variable(1.0, dtype=np.float64)
        self.seen = {True: [], False: []}

    def call(self, x, training=False):
        self.seen[training].append(x.numpy().reshape(-1).tolist())
        return x * self.w


def watch(loss="mse", **options):
    model = Watch()
    model.compile(tg.optimizers.SGD(0.0), loss, **options, run_eagerly=True)
    return model


COLUMN = np.arange(10.0)[:, None]
LABELS = np.arange(10) % 3


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_fit_goes_through_all_rows_in_every_epoch():
    model = watch()
    model.fit(COLUMN, COLUMN, batch_size=4, epochs=3, seed=0)
    assert [len(batch) for batch in model.seen[True]] == [4, 4, 2] * 3
    epochs = [joined(model.seen[True][i : i + 3]) for i in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert model.seen[False] == []
    in_order = watch()
    in_order.fit(COLUMN, COLUMN, batch_size=4, epochs=2, shuffle=False)
    assert joined(in_order.seen[True]) == list(range(10)) * 2


def test_fit_leaves_frozen_layers_alone():
    x, y = blobs(20)
    model = classifier()
    model.extra = tg.Variable(1.0, trainable=False)
    model.layers[0].trainable = False
    before = model.get_weights()
    model.compile("adam", from_logits())
    model.fit(x, y, epochs=2)
    for i, (was, now) in enumerate(zip(before, model.get_weights(), strict=True)):
        assert (was == now).all() == (i in (0, 1, 4))


def test_history_is_that_of_whole_epochs():
    x, y = blobs(43)
    model = classifier()
    model.compile(tg.optimizers.SGD(0.0), from_logits(), ["accuracy"])
    history = model.fit(x, y, batch_size=10, epochs=2, validation_data=(x[:7], y[:7]))
    scores = model(x).numpy()
    each = -special.log_softmax(scores, -1)[np.arange(43), y]
    expected = {
        "loss": each.mean(),  # by rows, though the last batch has three
        "accuracy": (scores.argmax(-1) == y).mean(),
        "val_loss": each[:7].mean(),
        "val_accuracy": (scores[:7].argmax(-1) == y[:7]).mean(),
    }
    assert list(history.history) == list(expected)
    assert history.epoch == [0, 1]
    assert not history.interrupted
    for name, value in expected.items():
        assert history.history[name] == pytest.approx([value] * 2, rel=1e-12)
        assert all(type(number) is float for number in history.history[name])
    assert repr(history).startswith("<History of 2 epochs: loss=")


def test_fit_learns():
    x, y = blobs(200)
    model = classifier()
    model.compile(tg.optimizers.Adam(0.01), from_logits(), ["accuracy"])
    history = model.fit(x, y, epochs=30, seed=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]
    assert model.evaluate(x, y)[1] > 0.9


@pytest.mark.parametrize("share", [0.2, 0.25, 0.5])
def test_validation_split_keeps_the_last_rows(share):
    model = watch()
    history = model.fit(COLUMN, 0 * COLUMN, batch_size=4, epochs=2, validation_split=share, seed=0)
    kept = 10 - int(10 * share)
    assert sorted(joined(model.seen[True])) == sorted(list(range(kept)) * 2)
    assert joined(model.seen[False]) == list(range(kept, 10)) * 2
    assert history.history["loss"][0] == pytest.approx((np.arange(kept) ** 2).mean())
    assert history.history["val_loss"][0] == pytest.approx((np.arange(kept, 10) ** 2).mean())


def test_validation_split_splits_weights_too():
    weights = np.arange(10.0)
    model = watch()
    history = model.fit(COLUMN, 0 * COLUMN, validation_split=0.3, sample_weight=weights)
    assert history.history["val_loss"] == pytest.approx([(np.arange(7, 10) ** 3.0).mean()])
    assert history.history["loss"] == pytest.approx([(np.arange(7) ** 3.0).mean()])


def test_validation_data_goes_before_the_split():
    model = watch()
    model.fit(COLUMN, COLUMN, validation_split=0.5, validation_data=(COLUMN[:2], COLUMN[:2]))
    assert model.seen[False] == [[0.0, 1.0]]
    assert len(joined(model.seen[True])) == 10
    weighted = (COLUMN[:3], 0 * COLUMN[:3], np.array([1.0, 3.0, 0.5]))
    history = model.fit(COLUMN, COLUMN, validation_data=weighted)
    assert history.history["val_loss"] == pytest.approx([(0 + 3.0 + 2.0) / 3])


def test_sample_weights():
    x, y = blobs(12)
    weights = np.linspace(0.0, 2.0, 12)
    model = classifier()
    model.compile(tg.optimizers.SGD(0.1), from_logits())
    scores = model(x).numpy()
    each = -special.log_softmax(scores, -1)[np.arange(12), y]
    w, b, v, c = model.get_weights()
    history = model.fit(x, y, batch_size=12, sample_weight=weights, shuffle=False).history
    assert history["loss"] == pytest.approx([(weights * each).mean()], rel=1e-12)
    h = np.maximum(x @ w + b, 0)
    error = (special.softmax(scores, -1) - np.eye(4)[y]) * weights[:, None] / 12
    back = error @ v.T * (h > 0)
    gradients = [x.T @ back, back.sum(0), h.T @ error, error.sum(0)]
    for variable, p, g in zip(model.variables, (w, b, v, c), gradients, strict=True):
        np.testing.assert_allclose(variable, p - 0.1 * g, rtol=1e-11, atol=1e-13)


def test_weighted_metrics_are_weighted_and_metrics_are_not():
    x, y = blobs(12)
    weights = np.linspace(0.0, 2.0, 12)
    model = classifier()
    model.compile(
        "sgd",
        from_logits(),
        metrics=["accuracy"],
        weighted_metrics=[tg.metrics.Accuracy("weighted_accuracy")],
    )
    hits = model(x).numpy().argmax(-1) == y
    found = model.evaluate(x, y, batch_size=5, sample_weight=weights, return_dict=True)
    assert 0 < hits.mean() < 1
    assert found["accuracy"] == pytest.approx(hits.mean())
    assert found["weighted_accuracy"] == pytest.approx((hits * weights).sum() / weights.sum())


@pytest.mark.parametrize("with_samples", [False, True])
def test_class_weights(with_samples):
    x, y = blobs(12)
    of_class = {0: 2.0, 3: 0.25}  # the others count 1
    samples = np.linspace(0.5, 2.0, 12) if with_samples else np.ones(12)
    weights = samples * [of_class.get(int(label), 1.0) for label in y]
    model, twin = classifier(), classifier()
    for each in (model, twin):
        each.compile(tg.optimizers.SGD(0.1), from_logits())
    found = model.fit(
        x,
        y,
        batch_size=5,
        epochs=3,
        seed=1,
        class_weight=of_class,
        sample_weight=samples if with_samples else None,
    )
    expected = twin.fit(x, y, batch_size=5, epochs=3, seed=1, sample_weight=weights)
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-6)
    plain = classifier()
    plain.compile(tg.optimizers.SGD(0.1), from_logits())
    scores = classifier()(x).numpy()
    each = -special.log_softmax(scores, -1)[np.arange(12), y]
    whole = plain.fit(x, y, batch_size=12, class_weight=of_class)
    weights = np.array([of_class.get(int(label), 1.0) for label in y])
    assert whole.history["loss"] == pytest.approx([(weights * each).mean()], rel=1e-6)


def test_class_weights_of_labels_below_zero():
    # Minus one was taken for the last class, by NumPy's habit of counting from the end.
    labels = LABELS[:, None] - 1
    model = watch(None)
    model.compute_loss = lambda y, p, weight: tg.sum(weight * p[:, 0])
    model.train_step = model.test_step
    history = model.fit(COLUMN, labels, batch_size=10, class_weight={1: 5.0, 10**12: 3.0})
    expected = (COLUMN[:, 0] * np.where(labels[:, 0] == 1, 5.0, 1.0)).sum()
    assert history.history["loss"] == pytest.approx([expected])
    history = model.fit(COLUMN, labels, batch_size=10, class_weight={-1: 5.0})
    expected = (COLUMN[:, 0] * np.where(labels[:, 0] == -1, 5.0, 1.0)).sum()
    assert history.history["loss"] == pytest.approx([expected])


def test_class_weights_want_integer_labels():
    with pytest.raises(TypeError, match="class_weight needs integer labels, got float64"):
        watch().fit(COLUMN, COLUMN, class_weight={0: 1.0})


def test_fit_on_batches_that_one_has_made():
    class Source:
        def __iter__(self):
            yield COLUMN[:3], 0 * COLUMN[:3]
            yield COLUMN[3:4], 0 * COLUMN[3:4], np.array([2.0])

    model = watch()
    history = model.fit(Source(), epochs=2)
    assert model.seen[True] == [[0.0, 1.0, 2.0], [3.0]] * 2
    assert history.history["loss"] == pytest.approx([(0 + 1 + 4 + 2 * 9) / 4] * 2)
    assert model.evaluate(Source()) == pytest.approx((0 + 1 + 4 + 2 * 9) / 4)
    fresh = watch()
    fresh.fit((batch for batch in Source()), epochs=1)
    assert fresh.seen[True] == [[0.0, 1.0, 2.0], [3.0]]
    again = watch()
    again.fit(tg.data.Batches((COLUMN, COLUMN), 4), epochs=2)
    assert joined(again.seen[True]) == list(range(10)) * 2


def test_a_generator_lasts_one_epoch_only():
    batches = ((COLUMN, COLUMN) for _ in range(2))
    with pytest.raises(ValueError, match=r"no batch for epoch 2: a generator lasts one pass"):
        watch().fit(batches, epochs=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_weight", np.zeros(10)),
        ("class_weight", {0: 2.0}),
        ("validation_split", 0.5),
    ],
)
def test_what_goes_with_rows_is_refused_with_batches(name, value):
    # The weights, for one, were left aside without a word.
    message = f"{name} goes with arrays x and y: x is an iterable of batches"
    model = watch()
    with pytest.raises(ValueError, match=message):
        model.fit(Batches((COLUMN, COLUMN), 5), **{name: value})
    assert not model.seen[True]
    if name == "sample_weight":
        with pytest.raises(ValueError, match=message):
            model.evaluate(Batches((COLUMN, COLUMN), 5), sample_weight=value)


def test_inputs_of_a_structure_are_split_too():
    model = watch()
    model.call = lambda x, training=False: x["a"] + x["b"]
    model.train_step = model.test_step
    history = model.fit(
        {"a": COLUMN, "b": COLUMN[::-1]}, 0 * COLUMN, validation_split=0.3, sample_weight=LABELS
    )
    assert history.history["loss"] == pytest.approx([81 * LABELS[:7].mean()])
    assert history.history["val_loss"] == pytest.approx([81 * LABELS[7:].mean()])


def test_evaluate_and_its_answers():
    x, y = blobs(23)
    model = classifier()
    model.compile("sgd", from_logits())
    scores = model(x).numpy()
    loss = (-special.log_softmax(scores, -1)[np.arange(23), y]).mean()
    hits = (scores.argmax(-1) == y).mean()
    assert model.evaluate(x, y, batch_size=5) == pytest.approx(loss, rel=1e-12)
    model.compile("sgd", from_logits(), metrics=["accuracy"])
    assert model.evaluate(x, y, batch_size=5) == pytest.approx([loss, hits], rel=1e-12)
    found = model.evaluate(x, y, batch_size=7, return_dict=True)
    assert found == pytest.approx({"loss": loss, "accuracy": hits}, rel=1e-12)
    kept = model.get_weights()
    model.evaluate(x, y)
    for before, after in zip(kept, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_predict(batch_size):
    x, _ = blobs(23)
    model = tg.Sequential([Dense(4, "softmax", dtype=np.float64), Dropout(0.9)])
    found = model.predict(x, batch_size)
    assert type(found) is np.ndarray
    np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-12)
    assert model.predict(x[:0]).shape == (0, 4)


def test_metrics_of_all_kinds():
    def largest(t, p):
        return tg.max(tg.abs(t - p), axis=-1)

    model = watch(metrics=["mae", largest, tg.metrics.MeanSquaredError("mine")])
    found = model.evaluate(COLUMN, 0 * COLUMN, return_dict=True)
    assert found == pytest.approx(
        {"loss": 28.5, "mean_absolute_error": 4.5, "largest": 4.5, "mine": 28.5}
    )
    single = watch(metrics="mae")
    assert list(single.evaluate(COLUMN, COLUMN, return_dict=True)) == [
        "loss",
        "mean_absolute_error",
    ]


def test_binary_classification_with_sample_weights():
    # One number an example, as Keras's binary accuracy gives: weights of examples go with it.
    model = watch("binary_crossentropy", weighted_metrics=["binary_accuracy", "accuracy"])
    p = np.array([[0.9], [0.2], [0.6], [0.4]])
    y, weights = np.array([[1.0], [1.0], [0.0], [0.0]]), np.array([1.0, 2.0, 4.0, 0.5])
    found = model.evaluate(p, y, sample_weight=weights, return_dict=True)
    assert found["binary_accuracy"] == pytest.approx((1.0 + 0.5) / 7.5)
    assert found["accuracy"] == pytest.approx((1.0 + 0.5) / 7.5)
    each = -np.log([0.9, 0.2, 0.4, 0.6])
    assert found["loss"] == pytest.approx((each * weights).mean())


def test_metrics_of_one_name_are_all_counted():
    model = watch(
        metrics=["mae", lambda t, p: p[:, 0], lambda t, p: t[:, 0]], weighted_metrics=["mae"]
    )
    weights = np.where(np.arange(10) == 9, 1.0, 0.0)
    found = model.evaluate(COLUMN, 0 * COLUMN, sample_weight=weights)
    assert found == pytest.approx([8.1, 4.5, 4.5, 0.0, 9.0])
    history = model.fit(COLUMN, 0 * COLUMN, sample_weight=weights)
    assert sorted(joined(history.history.values())) == pytest.approx([0.0, 4.5, 4.5, 8.1, 9.0])


def test_a_loss_function_of_ones_own():
    model = watch(loss=lambda t, p: tg.abs(p) * 3.0)
    assert model.evaluate(COLUMN[:, 0], COLUMN[:, 0]) == pytest.approx(13.5)

    class Own(Watch):
        def compute_loss(self, y_true, y_pred, sample_weight=None):
            return tg.max(y_pred)

    own = Own()
    own.compile("sgd")
    assert own.evaluate(COLUMN, COLUMN, batch_size=10) == 9.0


def test_a_train_step_of_ones_own():
    class Own(Watch):
        def train_step(self, x, y, sample_weight=None):
            self.w.assign_add(1.0)

    model = Own()
    model.compile("sgd", "mse")
    model.fit(COLUMN, COLUMN, batch_size=4, epochs=2)
    assert float(model.w) == 7.0


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Watch().fit(COLUMN, COLUMN), RuntimeError, r"compile\(optimizer, loss\) first"),
        (lambda: Watch().evaluate(COLUMN, COLUMN), RuntimeError, r"call compile\("),
        (lambda: Watch().optimizer, RuntimeError, r"call compile\("),
        (lambda: watch(None).fit(COLUMN, COLUMN), ValueError, "was given no loss"),
        (lambda: Watch().compile("adma", "mse"), ValueError, "optimizer must be .* got 'adma'"),
        (lambda: Watch().compile("adam", "mes"), ValueError, "loss must be .* got 'mes'"),
        (lambda: Watch().compile("adam", "mse", ["ac"]), ValueError, "metric must be .* got 'ac'"),
        (lambda: watch().fit(COLUMN), ValueError, "targets y are missing"),
        (lambda: watch().fit(COLUMN, COLUMN[:4]), ValueError, r"\[0\] has 10, arrays\[1\] has 4"),
        (lambda: watch().fit(COLUMN, COLUMN, epochs=-1), ValueError, "epochs must be at least 0"),
        (lambda: watch().fit(COLUMN, COLUMN, batch_size=0), ValueError, "batch_size must be at"),
        (lambda: watch().fit(COLUMN[:0], COLUMN[:0]), ValueError, "the data has no rows"),
        (
            lambda: watch().fit(COLUMN, COLUMN, validation_split=1.0),
            ValueError,
            r"validation_split must be from 0 to below 1, got 1\.0",
        ),
        (
            lambda: watch().fit(COLUMN, COLUMN, validation_split=0.01),
            ValueError,
            r"validation_split=0\.01 leaves nothing of 10 rows",
        ),
        (lambda: watch().fit(COLUMN, COLUMN, verbose=3), ValueError, "verbose must be 0, 1, 2 or"),
        (
            lambda: watch().fit(COLUMN, COLUMN, sample_weight=np.ones(3)),
            ValueError,
            r"arrays\[2\] has 3",
        ),
        (
            lambda: watch().fit(COLUMN, np.tile(COLUMN, (2, 1)), validation_split=0.5),
            ValueError,
            r"\[0\] has 10, arrays\[1\] has 20",
        ),
        (
            lambda: watch().fit(COLUMN, COLUMN, validation_data=Batches((COLUMN, COLUMN))),
            ValueError,
            r"validation_data is \(x, y\) or \(x, y, sample_weight\), got a Batches",
        ),
        (
            lambda: watch().fit(COLUMN, LABELS, class_weight=[1.0, 2.0]),
            TypeError,
            r"class_weight must be a dict \{label: weight\}, got \[1\.0, 2\.0\]",
        ),
        (
            lambda: watch().fit(COLUMN, LABELS, class_weight={"1": 2.0}),
            TypeError,
            "class_weight must be a dict .* got {'1': 2.0}",
        ),
        (
            lambda: watch().fit(COLUMN, np.eye(10, dtype=int), class_weight={1: 2.0}),
            ValueError,
            r"class_weight needs one label a row, got labels of shape \(10, 10\)",
        ),
        (lambda: watch().fit([(COLUMN,)]), ValueError, r"a batch is \(x, y\) .* got a tuple of 1"),
        (lambda: watch().fit([COLUMN]), ValueError, r"a batch is \(x, y\) or \(x, y, sample_w"),
    ],
)  # fmt: skip
def test_what_models_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_there_is_no_loss_of_no_rows():
    # A loss of 0.0 and an accuracy of 0 % would be numbers that nobody measured.
    with pytest.raises(ValueError, match=r"no rows|no batch"):
        watch(metrics=["mae"]).evaluate(COLUMN[:0], COLUMN[:0])


def test_a_batch_of_no_rows_leaves_the_weights_alone():
    # Its mean is NaN, and so was every weight after it.
    model = classifier()
    model.compile("adam", from_logits())
    x, y = blobs(8)
    model.fit([(x, y)])
    before = model.get_weights()
    with pytest.raises(ValueError, match="there is no mean of no examples: y_pred is empty"):
        model.fit([(x[:0], y[:0])])
    assert_weights(model, before)


def test_a_last_batch_of_one_row_that_the_model_squeezes():
    model = watch(metrics=["mae"])
    model.call = lambda x, training=False: tg.squeeze(x * model.w)
    history = model.fit(COLUMN[:9], 0 * COLUMN[:9, 0], batch_size=4, shuffle=False).history
    assert history["loss"] == pytest.approx([(np.arange(9.0) ** 2).mean()])
    assert history["mean_absolute_error"] == pytest.approx([4.0])


def test_no_epochs():
    model = watch()
    history = model.fit(COLUMN, COLUMN, epochs=0)
    assert (history.history, history.epoch) == ({}, [])
    assert repr(history) == "<History of 0 epochs>"


def test_history_as_a_file_and_a_picture(tmp_path):
    x, y = blobs(20)
    model = classifier()
    model.compile("adam", from_logits(), ["accuracy"])
    history = model.fit(x, y, epochs=3, validation_split=0.25, seed=0)
    history.save(tmp_path / "history.json")
    found = json.loads((tmp_path / "history.json").read_text())
    assert found == {"epoch": [0, 1, 2], **history.history}
    history.plot(tmp_path / "curves.png")
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


# ---- the progress line


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


@pytest.fixture
def columns(monkeypatch):
    """Set the width of the terminal, by whatever means it is asked for; 200 at first."""

    def narrow_to(number):
        monkeypatch.setenv("COLUMNS", str(number))
        monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((number, 24)))

    narrow_to(200)
    return narrow_to


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = types.SimpleNamespace(seconds=0.0)
    stand_in = types.SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(progress_module, "time", stand_in)
    return now


def test_the_progress_line(clock, columns):
    terminal = Terminal()
    line = Progress("auto", 3, terminal)
    line.begin(2, 8)
    clock.seconds = 0.05
    line.update(1, lambda: pytest.fail("nothing is drawn so soon"))
    assert terminal.getvalue() == ""
    clock.seconds = 10.0
    line.update(2, lambda: {"loss": 0.5, "accuracy": 0.75})
    first = "Epoch 2/3 |█████···············| 2/8 [00:10<00:30, 0.2 batch/s]"
    first += " loss=0.5000 accuracy=0.7500"
    assert terminal.getvalue() == "\r" + first
    clock.seconds = 10.05
    line.update(3, lambda: pytest.fail("nothing is drawn so soon"))
    clock.seconds = 80.0
    line.end(8, {"loss": 0.25})
    last = "Epoch 2/3 |████████████████████| 8/8 [01:20, 0.1 batch/s] loss=0.2500"
    # Blanks cover what is left of the longer line before.
    assert terminal.getvalue() == "\r" + first + "\r" + last + " " * (len(first) - len(last)) + "\n"


def test_the_progress_line_where_the_number_of_batches_is_not_known(clock, columns):
    terminal = Terminal()
    line = Progress(1, 1, terminal)
    line.begin(1, None)
    clock.seconds = 7200.0
    line.update(3600, lambda: {"loss": 12.3456789})
    line.end(3600, {})
    assert terminal.getvalue().startswith(
        "\rEpoch 1/1 3600 batch [2:00:00, 0.5 batch/s] loss=12.3457\r"
    )


def test_one_line_an_epoch(clock):
    stream = io.StringIO()
    line = Progress(2, 2, stream)
    for epoch in (1, 2):
        start = clock.seconds
        line.begin(epoch, 4)
        clock.seconds = start + 1.0
        line.update(2, lambda: pytest.fail("nothing is drawn"))
        clock.seconds = start + 2.0
        line.end(4, {"loss": 1.0, "val_loss": 2.0})
    assert stream.getvalue() == (
        "Epoch 1/2 4/4 [00:02, 2 batch/s] loss=1.0000 val_loss=2.0000\n"
        "Epoch 2/2 4/4 [00:02, 2 batch/s] loss=1.0000 val_loss=2.0000\n"
    )


def test_the_first_line_of_an_epoch_covers_nothing_of_the_one_before(clock, columns):
    terminal = Terminal()
    line = Progress(1, 2, terminal)
    line.begin(1, 1)
    clock.seconds = 1.0
    line.end(1, {"loss": 1.0, "long_name": 1.0})
    line.begin(2, 1)
    clock.seconds = 2.0
    line.end(1, {})
    assert terminal.getvalue().split("\n")[1].endswith("batch/s]")


@pytest.mark.parametrize("number", [30, 80, 100])
def test_the_line_fits_the_terminal(clock, columns, number):
    # A longer one wraps, and is then not written over: every drawing begins a new line.
    columns(number)
    terminal = Terminal()
    line = Progress(1, 60, terminal)
    numbers = {"loss": 0.0523, "accuracy": 0.9812, "val_loss": 0.1, "val_accuracy": 0.97}
    line.begin(10, 45)
    clock.seconds = 61.0
    line.update(12, lambda: {"loss": 0.0523})
    clock.seconds = 62.0
    line.update(13, lambda: numbers)
    for text in terminal.getvalue().split("\r")[1:]:
        assert len(text) < number
        assert text.startswith("Epoch 10/60 ")
        if number >= 80:
            assert "loss=0.0523" in text


def test_fit_on_a_terminal(monkeypatch, clock, columns):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    ticks = itertools.count()

    class Slow(Watch):
        def call(self, x, training=False):
            clock.seconds = next(ticks) * 0.25
            return super().call(x, training)

    model = Slow()
    model.compile(tg.optimizers.SGD(0.0), "mse", metrics=["mae"], run_eagerly=True)
    model.fit(
        COLUMN, 0 * COLUMN, batch_size=5, epochs=2, shuffle=False, validation_data=(COLUMN, COLUMN)
    )
    lines = terminal.getvalue().split("\n")
    assert len(lines) == 3
    assert lines[2] == ""
    for epoch, line in enumerate(lines[:2], 1):
        last = line.split("\r")[-1].rstrip()
        assert last.startswith(f"Epoch {epoch}/2 |████████████████████| 2/2 [00:0")
        assert last.endswith(
            "loss=28.5000 mean_absolute_error=4.5000 val_loss=0.0000 val_mean_absolute_error=0.0000"
        )
    # In between, the numbers of the first batch: rows 0 to 4.
    assert "| 1/2 [00:00<00:00, 4 batch/s] loss=6.0000 mean_absolute_error=2.0000" in lines[1]


def test_quiet_when_not_a_terminal(capsys):
    watch().fit(COLUMN, COLUMN, epochs=2)
    watch().fit(COLUMN, COLUMN, epochs=2, verbose="auto")
    assert capsys.readouterr() == ("", "")


def test_verbose_modes(capsys):
    watch().fit(COLUMN, 0 * COLUMN, epochs=2, verbose=2)
    out, err = capsys.readouterr()
    assert out == ""
    pattern = r"Epoch {}/2 1/1 \[00:00, [\d.e+]+ batch/s\] loss=28\.5000"
    lines = err.splitlines()
    assert len(lines) == 2
    for i, line in enumerate(lines, 1):
        assert re.fullmatch(pattern.format(i), line)
    watch().fit(COLUMN, COLUMN, verbose=1)
    assert capsys.readouterr().err.startswith("\rEpoch 1/1 |████")
    watch().fit(COLUMN, COLUMN, verbose=0)
    assert capsys.readouterr() == ("", "")


# ---- Ctrl-C


@pytest.fixture
def ctrl_c():
    """Let SIGINT interrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(tg.Model):
    """A linear model that is interrupted in the middle of a step, or of an evaluation."""

    def __init__(self, at, times=1, *, training=True):
        super().__init__()
        self.dense = Dense(1, kernel_initializer=tg.initializers.he_normal(1), dtype=np.float64)
        self.at, self.times, self.training = at, times, training
        self.calls = {True: 0, False: 0}

    def call(self, x, training=False):
        self.calls[training] += 1
        if training == self.training and self.calls[training] == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
        return self.dense(x)


def interrupted(at, *args, **options):
    model = Interrupted(at, *args, **options)
    model.compile(tg.optimizers.SGD(0.01, momentum=0.9), "mse", run_eagerly=True)
    return model


def plain_steps(count, batch_size=4):
    """Return kernel and bias after so many steps of momentum, by hand."""
    x, y = COLUMN, 3 * COLUMN + 1
    kernel = tg.initializers.he_normal(1)((1, 1), np.float64).numpy()
    p, v = np.array([kernel[0, 0], 0.0]), np.zeros(2)
    starts = itertools.cycle(range(0, 10, batch_size))
    for start in itertools.islice(starts, count):
        a, b = x[start : start + batch_size, 0], y[start : start + batch_size, 0]
        error = 2 * (a * p[0] + p[1] - b) / len(a)
        v = 0.9 * v - 0.01 * np.array([error @ a, error.sum()])
        p = p + v
    return p


def fit_column(model, **options):
    return model.fit(COLUMN, 3 * COLUMN + 1, batch_size=4, shuffle=False, **options)


@pytest.mark.parametrize(("at", "finished"), [(1, 0), (2, 0), (4, 1), (8, 2)])
def test_the_first_interrupt_ends_training_after_the_step(ctrl_c, at, finished):
    model = interrupted(at)
    before = signal.getsignal(signal.SIGINT)
    history = fit_column(model, epochs=5)  # three steps an epoch
    assert model.calls[True] == at
    np.testing.assert_allclose(
        [float(model.dense.kernel), float(model.dense.bias)], plain_steps(at), rtol=1e-10
    )
    assert int(model.optimizer.iterations) == at
    assert history.interrupted
    assert history.epoch == list(range(finished))
    assert len(history.history.get("loss", [])) == finished
    assert signal.getsignal(signal.SIGINT) is before
    # And it can go on from there.
    model.at = 0
    assert not fit_column(model, epochs=1).interrupted


def test_an_interrupt_while_validating_starts_no_further_step(ctrl_c):
    model = interrupted(1, training=False)
    history = fit_column(model, epochs=5, validation_data=(COLUMN, COLUMN))
    assert history.interrupted
    assert model.calls[True] == 3  # the steps of the first epoch


def test_the_second_interrupt_stops_at_once(ctrl_c):
    model = interrupted(5, 2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit_column(model, epochs=5)
    assert signal.getsignal(signal.SIGINT) is before
    np.testing.assert_allclose(
        [float(model.dense.kernel), float(model.dense.bias)], plain_steps(4), rtol=1e-10
    )


def test_an_interrupt_is_told_where_anything_is_shown(ctrl_c, capsys):
    fit_column(interrupted(4), epochs=5, verbose=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Epoch 1/5 3/3 ")
    assert lines[1] == "interrupted in epoch 2: the weights are as trained"
    model = interrupted(1, training=False)
    fit_column(model, epochs=5, verbose=2, validation_data=(COLUMN, COLUMN))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["interrupted after epoch 1: the weights are as trained"]
    fit_column(interrupted(4), epochs=5, verbose=0)
    assert capsys.readouterr() == ("", "")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        model = interrupted(2)
        assert not fit_column(model, epochs=2).interrupted
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert model.calls[True] == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_fit_on_another_thread_leaves_the_signals_alone():
    found = []
    model = interrupted(0)
    thread = threading.Thread(target=lambda: found.append(fit_column(model, epochs=2)))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    assert signal.getsignal(signal.SIGINT) is before
    thread.join(timeout=30)
    assert found[0].epoch == [0, 1]


def test_an_error_in_a_step_gives_the_signals_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="one shape"):
        watch().fit(COLUMN, np.ones((10, 3)))
    assert signal.getsignal(signal.SIGINT) is before


# ---- weights in files


def weights_of(model):
    return [v.numpy() for v in model.variables]


def assert_weights(model, expected):
    for found, value in zip(weights_of(model), expected, strict=True):
        np.testing.assert_array_equal(found, value)


def residual(seed):
    tg.random.seed(seed)
    model = Residual()
    model(np.ones((2, 3), np.float32))
    return model


def test_weights_round_trip(tmp_path):
    model, other = residual(0), residual(1)
    path = tmp_path / "weights.safetensors"
    model.save_weights(path)
    arrays, metadata = safetensors.load(path)
    assert sorted(arrays) == sorted(PATHS)
    assert metadata == {"format": "tapegrad"}
    for name, variable in model.named_variables():
        assert arrays[name].dtype == variable.dtype
        np.testing.assert_array_equal(arrays[name], variable)
    identities = [id(v) for v in other.variables]
    other.load_weights(str(path))
    assert_weights(other, weights_of(model))
    assert [id(v) for v in other.variables] == identities
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]  # nothing left beside


def test_the_official_reader_reads_the_weights(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy")
    model = residual(0)
    model.save_weights(tmp_path / "w")
    found = numpy_reader.load_file(tmp_path / "w")
    for name, variable in model.named_variables():
        np.testing.assert_array_equal(found[name], variable)


def test_weights_of_a_trained_model_whose_variables_share_a_buffer(tmp_path):
    x, y = blobs(40)
    model, other = classifier(seed=0), classifier(seed=1)
    for each in (model, other):
        each.compile("adam", from_logits())
        each.fit(x, y, epochs=2, seed=0)
    model.save_weights(tmp_path / "w")
    other.load_weights(tmp_path / "w")
    np.testing.assert_array_equal(other.predict(x), model.predict(x))
    history = other.fit(x, y, epochs=1, seed=0)  # and it trains on
    assert np.isfinite(history.history["loss"][0])
    assert_weights(model, safetensors_values(tmp_path / "w", model))


def safetensors_values(path, model):
    arrays, _ = safetensors.load(path)
    return [arrays[name] for name, _ in model.named_variables()]


def test_float64_weights_in_a_float32_model(tmp_path):
    model, other = classifier(dtype=np.float64), classifier(seed=1, dtype=np.float32)
    model.save_weights(tmp_path / "w")
    other.load_weights(tmp_path / "w")
    assert {v.dtype.name for v in other.variables} == {"float32"}
    assert_weights(other, [w.astype(np.float32) for w in weights_of(model)])


def test_fractions_in_place_of_whole_numbers(tmp_path):
    class Counter(tg.Model):
        def __init__(self):
            super().__init__()
            self.count = tg.Variable(3, trainable=False)
            self.rate = tg.Variable(0.5)

    model, path = Counter(), tmp_path / "w"
    for wrong in (2.7, np.nan):  # 2, and the smallest number of all
        safetensors.save(path, {"count": np.array(wrong), "rate": np.array(1.0)})
        with pytest.raises(ValueError, match="count holds float64 in the file, int64 in the model"):
            model.load_weights(path)
        assert [v.numpy().item() for v in model.variables] == [3, 0.5]
    safetensors.save(path, {"count": np.array(4, np.int32), "rate": np.array(1)})
    model.load_weights(path)
    assert [v.numpy().item() for v in model.variables] == [4, 1.0]


def broken_files(path):
    """Yield (what is wrong, the error, its message) after writing each broken file."""
    residual(0).save_weights(path)
    arrays, _ = safetensors.load(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    yield tg.FormatError, rf"{re.escape(str(path))}: byte \d+: "
    path.write_bytes(b"\x80\x04" + content[2:])  # as a pickle begins
    yield tg.FormatError, re.escape(str(path))
    path.write_bytes(b"")
    yield tg.FormatError, re.escape(str(path))
    safetensors.save(path, {k: v for k, v in arrays.items() if k != "scale"})
    yield ValueError, r"the file is of another model; missing there: scale; unknown: none"
    safetensors.save(path, {**arrays, "extra": np.ones(2)})
    yield ValueError, r"missing there: none; unknown: extra"
    last = {**arrays, "block.layers.0.bias": np.ones(3, np.float32)}
    safetensors.save(path, last)
    yield ValueError, r"block\.layers\.0\.bias has shape \(3,\) in the file, \(2,\) in the model"
    safetensors.save(path, {**arrays, "scale": np.ones(1, np.float32)})
    yield ValueError, r"scale has shape \(1,\) in the file, \(\) in the model"
    path.unlink()
    yield FileNotFoundError, re.escape(str(path))


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    model = residual(1)
    kept = weights_of(model)
    for kind, message in broken_files(tmp_path / "w"):
        with pytest.raises(kind, match=message):
            model.load_weights(tmp_path / "w")
        assert_weights(model, kept)


def test_weights_that_cannot_be_written_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w"
    residual(0).save_weights(path)
    content = path.read_bytes()

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        residual(1).save_weights(path)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_weights_before_there_are_any(tmp_path):
    model = tg.Sequential([Dense(2)])
    for call in (model.save_weights, model.load_weights):
        with pytest.raises(ValueError, match="the model has no variables yet; call it on a batch"):
            call(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_get_and_set_weights():
    model, other = classifier(seed=0), classifier(seed=1)
    weights = model.get_weights()
    other.set_weights(weights)
    assert_weights(other, weights)
    weights[0][:] = 0.0  # they are copies
    assert (model.get_weights()[0] != 0.0).any()
    with pytest.raises(ValueError, match="3 weights for 4 variables"):
        other.set_weights(weights[:3])
    before = other.get_weights()
    wrong = [2 * weight for weight in before[:3]] + [np.zeros(5)]
    with pytest.raises(
        ValueError, match=r"layers\.1\.bias has shape \(4,\), its weights have \(5,\)"
    ):
        other.set_weights(wrong)
    assert_weights(other, before)  # the first three fitted


def test_a_copy_of_a_model_is_its_own():
    model = tg.Sequential([Dense(4, "relu"), Dropout(0.5, seed=1), Dense(2)])
    x = np.ones((8, 3), np.float32)
    model(x)
    twin = copy.deepcopy(model)
    np.testing.assert_array_equal(twin(x, training=True), model(x, training=True))
    before = model.get_weights()
    twin.compile("sgd", "mse")
    twin.fit(x, np.ones((8, 2)))
    assert_weights(model, before)
    assert (twin.get_weights()[0] != before[0]).any()


def test_weights_of_a_torn_variable_can_be_loaded(tmp_path):
    # What a step that failed in its middle leaves: the error says that loading helps.
    model = classifier()
    weights = model.get_weights()
    model.save_weights(tmp_path / "weights")
    for load in (
        lambda: model.load_weights(tmp_path / "weights"),
        lambda: model.set_weights(weights),
    ):
        model.variables[1]._tear("a test")
        with pytest.raises(RuntimeError, match="load its weights again"):
            model.get_weights()
        load()
        assert_weights(model, weights)


# ---- the same again


def train_once(seed, order=None):
    tg.random.seed(seed)
    model = tg.Sequential([Dense(16, "relu"), Dropout(0.3), Dense(4)])
    model.compile("adam", from_logits(), ["accuracy"])
    x, y = blobs(50)
    history = model.fit(x, y, batch_size=8, epochs=3, seed=order)
    return history.history, model.get_weights()


def test_a_seed_gives_the_same_weights_bit_by_bit():
    (history, weights), (again, same) = train_once(7), train_once(7)
    assert history == again
    for a, b in zip(weights, same, strict=True):
        np.testing.assert_array_equal(a, b)
    other, different = train_once(8)
    assert history != other
    assert (weights[0] != different[0]).any()


def test_the_seed_of_fit_is_that_of_the_order_only():
    def run(order):
        model = classifier(seed=0)
        model.compile(tg.optimizers.SGD(0.1), from_logits())
        x, y = blobs(50)
        model.fit(x, y, batch_size=8, seed=order)
        return model.get_weights()

    for a, b in zip(run(1), run(1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(run(1), run(2), strict=True))


def test_an_explicit_loop_is_what_fit_does():
    x, y = blobs(50)
    history, weights = train_once(3, order=11)

    tg.random.seed(3)
    model = tg.Sequential([Dense(16, "relu"), Dropout(0.3), Dense(4)])
    optimizer, loss_of = tg.optimizers.Adam(), from_logits()
    losses = []
    batches = tg.data.Batches((x, y), 8, shuffle=True, seed=11)
    for _ in range(3):
        mean = tg.metrics.Mean()
        for batch, labels in batches:
            with tg.GradientTape() as tape:
                loss = loss_of(labels, model(batch, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            mean.update_state(loss, float(len(labels)))
        losses.append(float(mean.result()))
    # fit compiles the step, which may change the order of sums
    np.testing.assert_allclose(losses, history["loss"], rtol=1e-6)
    for a, b in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ---- the fused primitives against the plain composition


def fused(x, y, w1, b1, w2, b2):
    return tg.nn.softmax_cross_entropy(tg.nn.linear(tg.nn.linear_relu(x, w1, b1), w2, b2), y)


def plain(x, y, w1, b1, w2, b2):
    h = tg.maximum(tg.matmul(x, w1) + b1, 0.0)
    logits = tg.matmul(h, w2) + b2
    shifted = logits - tg.max(logits, axis=1, keepdims=True)
    log_p = shifted - tg.log(tg.sum(tg.exp(shifted), axis=1, keepdims=True))
    return -tg.mean(tg.take_along_axis(log_p, tg.expand_dims(tg.constant(y), -1), axis=1))


@pytest.mark.parametrize(
    "optimizer", [lambda: tg.optimizers.SGD(0.1, momentum=0.9), lambda: tg.optimizers.Adam(0.01)]
)
def test_training_with_the_fused_primitives_and_without(optimizer):
    x, y = blobs(64, features=5)
    rng = np.random.default_rng(1)
    start = [rng.normal(size=s) / 3 for s in ((5, 12), (12,), (12, 4), (4,))]

    def train(loss_of):
        variables, taken, losses = [tg.Variable(p) for p in start], optimizer(), []
        for step in range(40):
            part = slice(16 * (step % 4), 16 * (step % 4) + 16)
            with tg.GradientTape() as tape:
                loss = loss_of(x[part], y[part], *variables)
            taken.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            losses.append(float(loss))
        return losses

    found, expected = train(fused), train(plain)
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=1e-11)


# ---- real data


def test_make_train_reaches_97_percent(tmp_path):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    (command,) = re.findall(r"^\t\S*tapegrad (train .*)$", makefile, re.MULTILINE)
    assert command.split()[:3] == ["train", "--data", "digits"]
    # BLAS threads that spin for each other cost tenfold on a machine that is busy otherwise.
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(tg.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tapegrad", *command.split(), "--backend", "numpy"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", done.stdout, re.MULTILINE)
    assert float(accuracy) >= 97.0
    assert (tmp_path / "runs" / "digits" / "weights.safetensors").is_file()
    assert (tmp_path / "runs" / "digits" / "curves.png").is_file()
