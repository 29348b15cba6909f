"""Optimisers against plain formulas, and the flat buffers that their variables lie in."""

import copy
import inspect
import pickle
import threading
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapegrad as tg
from tapegrad import _blocks, _storage, optimizers
from tapegrad._backend import owner_of

# ---- the formulas, written for one variable at a time and from the papers, step t counting from 1


def sgd(p, g, s, t, *, learning_rate=0.01):
    return p - learning_rate * g


def momentum(p, g, s, t, *, learning_rate=0.01, momentum):
    s["velocity"] = momentum * s.get("velocity", 0.0) - learning_rate * g
    return p + s["velocity"]


def nesterov(p, g, s, t, *, learning_rate=0.01, momentum):
    s["velocity"] = momentum * s.get("velocity", 0.0) - learning_rate * g
    return p + momentum * s["velocity"] - learning_rate * g


def adagrad(p, g, s, t, *, learning_rate=1e-3, initial_accumulator_value=0.1, epsilon=1e-7):
    s["accumulator"] = s.get("accumulator", initial_accumulator_value) + g**2
    return p - learning_rate * g / (np.sqrt(s["accumulator"]) + epsilon)


def rmsprop(p, g, s, t, *, learning_rate=1e-3, rho=0.9, epsilon=1e-7):
    s["mean_square"] = rho * s.get("mean_square", 0.0) + (1.0 - rho) * g**2
    return p - learning_rate * g / (np.sqrt(s["mean_square"]) + epsilon)


def adam(
    p, g, s, t, *, learning_rate=1e-3, beta_1=0.9, beta_2=0.999, epsilon=1e-8, weight_decay=0.0
):
    s["m"] = beta_1 * s.get("m", 0.0) + (1.0 - beta_1) * g
    s["v"] = beta_2 * s.get("v", 0.0) + (1.0 - beta_2) * g**2
    m_hat, v_hat = s["m"] / (1.0 - beta_1**t), s["v"] / (1.0 - beta_2**t)
    p = p - learning_rate * weight_decay * p
    return p - learning_rate * m_hat / (np.sqrt(v_hat) + epsilon)


def adamw(p, g, s, t, *, weight_decay=0.004, **options):
    return adam(p, g, s, t, weight_decay=weight_decay, **options)


CASES = {
    "sgd": (optimizers.SGD, sgd, {"learning_rate": 0.05}),
    "sgd's defaults": (optimizers.SGD, sgd, {}),
    "momentum": (optimizers.SGD, momentum, {"learning_rate": 0.02, "momentum": 0.9}),
    "nesterov": (optimizers.SGD, nesterov, {"learning_rate": 0.02, "momentum": 0.8}),
    "adagrad": (optimizers.Adagrad, adagrad, {"learning_rate": 0.1}),
    "adagrad's defaults": (optimizers.Adagrad, adagrad, {}),
    "adagrad, its options": (
        optimizers.Adagrad,
        adagrad,
        {"learning_rate": 0.2, "initial_accumulator_value": 0.0, "epsilon": 1e-3},
    ),
    "rmsprop": (optimizers.RMSprop, rmsprop, {"learning_rate": 0.01}),
    "rmsprop's defaults": (optimizers.RMSprop, rmsprop, {}),
    "rmsprop, its options": (
        optimizers.RMSprop,
        rmsprop,
        {"learning_rate": 0.02, "rho": 0.5, "epsilon": 1e-2},
    ),
    "adam": (optimizers.Adam, adam, {"learning_rate": 0.01}),
    "adam's defaults": (optimizers.Adam, adam, {}),
    "adam, its options": (
        optimizers.Adam,
        adam,
        {"learning_rate": 0.03, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-2},
    ),
    "adam with weight decay": (
        optimizers.Adam,
        adam,
        {"learning_rate": 0.02, "weight_decay": 0.1},
    ),
    "adamw": (optimizers.AdamW, adamw, {"learning_rate": 0.01, "weight_decay": 0.05}),
    "adamw's defaults": (optimizers.AdamW, adamw, {}),
}


def made(case):
    """Return a case's optimiser and its plain formula of (p, g, slots, t)."""
    kind, formula, options = CASES[case]
    extra = {"nesterov": True} if formula is nesterov else {}
    return kind(**options, **extra), lambda p, g, s, t: formula(p, g, s, t, **options)


# ---- the problem: every variable's gradient depends on all the others, and none is ever zero

SHAPES = {
    "scalar": (),
    "three": (3,),
    "odd": (7, 5),
    "empty": (0, 4),
    "over a unit": (65,),  # 520 bytes in float64, 260 in float32
    "large": (33, 9),
    "deep": (2, 3, 1, 5),
}


class Problem:
    """sum(c (1 - cos(p - t)) + q p**2 / 2) + (w . p)**2 / 20, over all variables together."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
        self.c, self.q, self.t, self.w = (
            {name: spread(rng, shape) for name, shape in SHAPES.items()}
            for spread in (
                lambda rng, shape: rng.uniform(0.5, 2.0, shape),
                lambda rng, shape: rng.uniform(0.1, 1.0, shape),
                lambda rng, shape: rng.normal(size=shape),
                lambda rng, shape: rng.normal(size=shape) / 10,
            )
        )

    def variables(self, dtype=np.float64):
        return {name: tg.Variable(p, dtype=dtype, name=name) for name, p in self.start.items()}

    def loss(self, variables):
        """The loss of tapegrad's variables."""
        total, along = 0.0, 0.0
        for name, p in variables.items():
            c, q, t, w = (x[name].astype(p.dtype) for x in (self.c, self.q, self.t, self.w))
            total = total + tg.sum(c * (1.0 - tg.cos(p - t)) + 0.5 * q * p * p)
            along = along + tg.sum(w * p)
        return total + along * along / 20.0

    def gradients(self, values):
        """The gradients at NumPy values, by hand."""
        along = sum(np.sum(self.w[name] * p) for name, p in values.items())
        return {
            name: self.c[name] * np.sin(p - self.t[name])
            + self.q[name] * p
            + along / 10 * self.w[name]
            for name, p in values.items()
        }


def run(case, dtype, check=None):
    """Take 100 steps by tapegrad and by the formula, both with the formula's gradients.

    With gradients of its own, each would be judged by how the problem amplifies rounding: Adam
    near an optimum, where it divides a small gradient by its own size, makes 1e-3 of 1e-7.
    """
    problem = Problem()
    optimizer, formula = made(case)
    variables, values = problem.variables(dtype), dict(problem.start)
    slots = {name: {} for name in values}
    for t in range(1, 101):
        gradients = problem.gradients(values)
        values = {n: formula(values[n], gradients[n], slots[n], t) for n in values}
        optimizer.apply_gradients([(gradients[n].astype(dtype), v) for n, v in variables.items()])
        if check is not None:
            check(variables, values)
    return optimizer, variables, values, slots


@pytest.mark.parametrize("case", CASES)
def test_a_hundred_steps_equal_the_formula(case):
    def check(variables, values):
        for name, variable in variables.items():
            np.testing.assert_allclose(variable, values[name], rtol=1e-12, atol=1e-12)

    optimizer, variables, values, slots = run(case, np.float64, check)
    start = Problem().start
    assert int(optimizer.iterations) == 100
    for name, variable in variables.items():
        assert variable.shape == SHAPES[name]
        assert variable.size == 0 or np.abs(values[name] - start[name]).max() > 0.01  # it moved
        for slot, value in slots[name].items():
            found = optimizer.slot(variable, slot)
            assert found.shape == variable.shape
            np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_float32_stays_close_to_float64(case):
    _, variables, values, _ = run(case, np.float32)
    for name, variable in variables.items():
        assert variable.dtype == np.float32
        np.testing.assert_allclose(variable, values[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [5, 70_000])  # a block, and more
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["sgd", "nesterov", "adagrad", "rmsprop", "adam", "adamw"])
def test_16_bits_are_rounded_once_in_a_step(case, dtype, size, compiled):
    """Each step is the formula's, from the rounded values of the last, to half a unit."""
    rng = np.random.default_rng(2)
    optimizer, formula = made(case)
    variable = tg.Variable(rng.normal(size=size).astype(dtype))
    apply = tg.function(lambda g: optimizer.apply([g], [variable])) if compiled else None
    slots = {"accumulator": float(np.array(0.1, dtype))} if case == "adagrad" else {}
    half = 2**-11 if variable.dtype == np.float16 else 2**-8
    # small ones, whose squares are below float16's smallest number
    scale = np.where(np.arange(size) % 2, 1.0, 1e-4)
    for t in range(1, 6):
        p = variable.numpy().astype("f8")
        g = (rng.normal(size=size) * scale).astype(dtype)
        want = formula(p, g.astype("f8"), slots, t)
        if compiled:
            apply(tg.constant(g))
        else:
            optimizer.apply([g], [variable])
        got = variable.numpy()
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype("f8"), want, rtol=1.01 * half, atol=1e-6)
        for name, value in slots.items():
            slot = optimizer.slot(variable, name).numpy()
            assert slot.dtype == dtype
            # float16's smallest number is 6e-8
            np.testing.assert_allclose(slot.astype("f8"), value, rtol=1.01 * half, atol=3.1e-8)
            slots[name] = slot.astype("f8")


def test_a_gradient_of_16_bits_is_scaled_in_float32_and_stays_as_it_is():
    p, g = np.ones(3, "f2"), np.array([3, 1e-4, 6e4], "f2")
    before = g.copy()
    # 1000 * 6e4 is beyond float16
    optimizers.sgd_update.compute([p, g, np.array(1000.0), np.array(1e-3)], {})
    np.testing.assert_array_equal(p, (1 - before.astype("f8")).astype("f2"))
    np.testing.assert_array_equal(g, before)


@pytest.mark.parametrize("case", ["sgd", "nesterov", "adagrad", "rmsprop", "adam", "adamw"])
def test_a_hundred_steps_with_the_tape(case):
    problem = Problem(seed=1)
    optimizer, formula = made(case)
    variables, values = problem.variables(), dict(problem.start)
    slots = {name: {} for name in values}
    for t in range(1, 101):
        with tg.GradientTape() as tape:
            loss = problem.loss(variables)
        sources = list(variables.values())
        optimizer.apply_gradients(zip(tape.gradient(loss, sources), sources, strict=True))
        gradients = problem.gradients(values)
        values = {n: formula(values[n], gradients[n], slots[n], t) for n in values}
    for name, variable in variables.items():
        np.testing.assert_allclose(variable, values[name], rtol=1e-11, atol=1e-12)


def test_float16_variables_stay_float16():
    variable = tg.Variable([1.0, -2.0], dtype=np.float16)
    for optimizer in (optimizers.SGD(0.5, momentum=0.5), optimizers.Adam(0.5)):
        variable.assign(np.array([1.0, -2.0], np.float16))
        optimizer.apply_gradients([(np.array([0.25, -1.0], np.float16), variable)])
        assert variable.dtype == np.float16
        moved = np.array([0.875, -1.5]) if optimizer.name == "sgd" else np.array([0.5, -1.5])
        np.testing.assert_allclose(variable, moved, atol=1e-3)


def test_the_first_step_of_adam_is_the_learning_rate_whatever_the_gradient():
    gradient = np.tile([1e-9, -3.0, 1e6, -1e-3], 8)
    variable = tg.Variable(np.zeros(32))  # 256 bytes, so that no padding is behind it
    optimizers.Adam(0.125, epsilon=0.0).apply_gradients([(gradient, variable)])
    np.testing.assert_allclose(variable, -0.125 * np.sign(gradient), rtol=1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizers.Adam(0.5, epsilon=0.0),
        optimizers.RMSprop(0.5, rho=0.0, epsilon=0.0),
        optimizers.Adagrad(0.5, initial_accumulator_value=0.0, epsilon=0.0),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_padding_between_variables_is_not_divided_by_zero(optimizer):
    # With epsilon 0 the first step is the rate times the gradient's sign; a warning is an error.
    variables = [tg.Variable(np.zeros(3)), tg.Variable(np.zeros(5))]
    gradients = [np.array([1.0, -2.0, 3.0]), np.array([-1.0, 2.0, -3.0, 4.0, -5.0])]
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    for variable, gradient in zip(variables, gradients, strict=True):
        np.testing.assert_allclose(variable, -0.5 * np.sign(gradient), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=5),
    learning_rate=st.floats(1e-4, 1.0),
    betas=st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.999)),
    epsilon=st.floats(1e-8, 1.0),
    weight_decay=st.floats(0.0, 0.5),
)
def test_adam_at_sampled_settings(seed, shapes, learning_rate, betas, epsilon, weight_decay):
    rng = np.random.default_rng(seed)
    options = {
        "learning_rate": learning_rate,
        "beta_1": betas[0],
        "beta_2": betas[1],
        "epsilon": epsilon,
        "weight_decay": weight_decay,
    }
    optimizer = optimizers.Adam(**options)
    values = [rng.normal(size=shape) for shape in shapes]
    variables = [tg.Variable(p) for p in values]
    slots = [{} for _ in shapes]
    for t in range(1, 6):
        gradients = [rng.normal(size=shape) for shape in shapes]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        values = [
            adam(p, g, s, t, **options) for p, g, s in zip(values, gradients, slots, strict=True)
        ]
    for variable, p in zip(variables, values, strict=True):
        np.testing.assert_allclose(variable, p, rtol=1e-10, atol=1e-12)


# ---- long arrays, in blocks and over threads

LENGTHS = [_blocks.BLOCK - 1, _blocks.BLOCK, _blocks.BLOCK + 1, 3 * _blocks.BLOCK + 17]


@pytest.mark.parametrize("length", [*LENGTHS, (1 << 20) - 1, (1 << 20) + 12345])
@pytest.mark.parametrize("case", ["sgd", "nesterov", "adagrad", "rmsprop", "adamw"])
def test_long_variables(case, length):
    rng = np.random.default_rng(length)
    optimizer, formula = made(case)
    p, slots = rng.normal(size=length), {}
    variable = tg.Variable(p)
    for t in (1, 2):
        g = rng.normal(size=length)
        optimizer.apply_gradients([(g, variable)])
        p = formula(p, g, slots, t)
    np.testing.assert_allclose(variable, p, rtol=1e-12, atol=1e-13)


def test_many_variables_make_one_long_buffer():
    rng = np.random.default_rng(3)
    optimizer, formula = made("adam")
    lengths = [*LENGTHS, 1, 700_001, 5, 300_000]  # together above a million: over threads
    values = [rng.normal(size=n) for n in lengths]
    gradients = [rng.normal(size=n) for n in lengths]
    variables = [tg.Variable(p) for p in values]
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    for variable, p, g in zip(variables, values, gradients, strict=True):
        np.testing.assert_allclose(variable, formula(p, g, {}, 1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("fixed", [False, True])
def test_blocks_cover_every_element_once(monkeypatch, fixed, threads):
    monkeypatch.setattr(_blocks, "BLOCK", 8)
    monkeypatch.setattr(_blocks, "_THREADS_FROM", 40)
    monkeypatch.setattr(_blocks, "_THREADS", threads)
    for size in [*range(130), 1000, 1024, 1025]:
        seen = np.zeros(size, int)
        lanes, workers = {}, {}

        def work(s, lane, seen=seen, lanes=lanes, workers=workers):
            assert 0 < s.stop - s.start <= 8
            seen[s] += 1
            lanes.setdefault(lane, []).append(s.start)
            assert workers.setdefault(lane, threading.get_ident()) == threading.get_ident()

        _blocks.for_rows(size, 8, _blocks.lanes(size), work, fixed=fixed)
        assert (seen == 1).all()
        assert len(workers) <= (1 if size < 40 else threads)
        if fixed:
            assert workers.get(0) in (None, threading.get_ident())
            share = -(-len(range(0, size, 8)) // _blocks.lanes(size)) * 8
            for lane, starts in lanes.items():
                assert starts == list(range(lane * share, min((lane + 1) * share, size), 8))


def test_what_a_block_raises_is_raised(monkeypatch):
    monkeypatch.setattr(_blocks, "_THREADS", 2)

    def work(s, lane):
        if s.stop == size:
            raise ArithmeticError("the last block")

    for size in (10, (1 << 20) + 5):
        with pytest.raises(ArithmeticError, match="the last block"):
            _blocks.for_rows(size, _blocks.BLOCK, _blocks.lanes(size), work)


def test_one_thread_beside_products(monkeypatch):
    monkeypatch.setattr(_blocks, "_THREADS", 3)
    assert _blocks.lanes(1 << 22, beside_products=True) == 1
    assert _blocks.lanes(1 << 22) == 3
    assert _blocks.lanes(1 << 18) == 1


# ---- variables without a gradient


def told(call):
    """Return the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught


@pytest.mark.parametrize("case", ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adamw"])
@pytest.mark.parametrize("absent", [{0}, {2}, {4}, {1, 2}, {0, 4}, {1, 3}])
def test_none_leaves_variable_and_slots_as_they_are(case, absent):
    rng = np.random.default_rng(7)
    optimizer, formula = made(case)
    lengths = [3, 70, 1, 64, 5]
    values = [rng.normal(size=n) for n in lengths]
    variables = [tg.Variable(p, name=f"v{i}") for i, p in enumerate(values)]
    slots = [{} for _ in lengths]
    for t in range(1, 7):
        gradients = [rng.normal(size=n) for n in lengths]
        left_out = absent if t in (2, 3, 5) else set()
        given = [None if i in left_out else g for i, g in enumerate(gradients)]
        before = [v.numpy() for v in variables]
        slots_before = copy.deepcopy(slots)
        caught = told(lambda: optimizer.apply_gradients(zip(given, variables, strict=True)))  # noqa: B023
        assert len(caught) == (t == 2)
        for i, g in enumerate(gradients):
            if i in left_out:
                np.testing.assert_array_equal(variables[i], before[i])
                for slot, value in slots_before[i].items():
                    np.testing.assert_allclose(
                        optimizer.slot(variables[i], slot), value, rtol=1e-12, atol=1e-14
                    )
            else:
                values[i] = formula(values[i], g, slots[i], t)
                np.testing.assert_allclose(variables[i], values[i], rtol=1e-12, atol=1e-14)


def test_one_warning_names_all_that_have_no_gradient():
    kept, left, right = (tg.Variable(1.0, name=name) for name in ("kept", "left", "right"))
    optimizer = optimizers.Adam()
    gradients = [(1.0, kept), (None, left), (None, right)]
    caught = told(lambda: optimizer.apply_gradients(gradients))
    assert [w.category for w in caught] == [tg.TapeWarning]
    text = str(caught[0].message)
    assert "left" in text
    assert "right" in text
    assert "kept" not in text
    assert told(lambda: optimizer.apply_gradients(gradients)) == []
    # Another optimiser knows nothing of the first one's warning.
    assert len(told(lambda: optimizers.SGD().apply_gradients(gradients))) == 1


def test_the_warning_points_at_the_line_that_took_the_step():
    def take_a_step():
        optimizers.SGD().apply_gradients([(None, tg.Variable(1.0))])

    (caught,) = told(take_a_step)
    first = inspect.getsourcelines(take_a_step)[1]
    assert (caught.filename, caught.lineno) == (__file__, first + 1)


def test_all_gradients_none():
    variable = tg.Variable([1.0, 2.0], name="lonely")
    optimizer = optimizers.SGD(1.0)
    with pytest.warns(tg.TapeWarning, match="no gradient for lonely"):
        optimizer.apply_gradients([(None, variable)])
    np.testing.assert_array_equal(variable, [1.0, 2.0])
    optimizer.apply_gradients([([1.0, 1.0], variable)])
    np.testing.assert_array_equal(variable, [0.0, 1.0])


def test_a_variable_that_the_loss_does_not_reach():
    used, unused = tg.Variable(2.0, name="used"), tg.Variable(3.0, name="unused")
    optimizer = optimizers.SGD(0.25)
    with tg.GradientTape() as tape:
        loss = used * used
    gradients = tape.gradient(loss, [used, unused])
    with pytest.warns(tg.TapeWarning, match="unused"):
        optimizer.apply_gradients(zip(gradients, [used, unused], strict=True))
    assert (float(used), float(unused)) == (1.0, 3.0)


# ---- layers that are frozen or shared, and several optimisers


def mean_square_step(model, optimizer, x, y):
    with tg.GradientTape() as tape:
        loss = tg.mean(tg.square(model(x) - y))
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return float(loss)


def linear(units, seed):
    return tg.layers.Dense(
        units, kernel_initializer=tg.initializers.he_normal(seed), dtype=np.float64
    )


def data():
    rng = np.random.default_rng(5)
    return rng.normal(size=(8, 3)), rng.normal(size=(8, 2))


def test_a_frozen_layer_stays_and_the_others_learn():
    x, y = data()
    frozen, free = linear(4, 1), linear(2, 2)
    model = tg.Sequential([frozen, free])
    model.build((None, 3))
    frozen.trainable = False
    kept = [v.numpy() for v in frozen.variables]
    kernel, bias = (v.numpy() for v in free.variables)
    h = x @ kept[0] + kept[1]
    optimizer = optimizers.SGD(0.1)
    losses = []
    for _ in range(20):
        error = h @ kernel + bias - y
        losses.append(np.mean(error**2))
        kernel = kernel - 0.1 * (2 / error.size) * h.T @ error
        bias = bias - 0.1 * (2 / error.size) * error.sum(0)
        loss = mean_square_step(model, optimizer, x, y)
        np.testing.assert_allclose(loss, losses[-1], rtol=1e-12)
    for variable, before in zip(frozen.variables, kept, strict=True):
        np.testing.assert_array_equal(variable, before)
    np.testing.assert_allclose(free.kernel, kernel, rtol=1e-12)
    np.testing.assert_allclose(free.bias, bias, rtol=1e-12)
    # Thawed, it learns on the very next step.
    frozen.trainable = True
    mean_square_step(model, optimizer, x, y)
    assert (frozen.kernel.numpy() != kept[0]).all()


@pytest.mark.parametrize("same_optimizer", [True, False])
def test_a_layer_shared_by_two_models(same_optimizer):
    x, y = data()
    shared = linear(4, 1)
    models = [tg.Sequential([shared, linear(2, 2)]), tg.Sequential([shared, linear(2, 3)])]
    for model in models:
        model.build((None, 3))
    first = optimizers.SGD(0.1, momentum=0.5)
    chosen = [first, first if same_optimizer else optimizers.SGD(0.1, momentum=0.5)]
    common = [v.numpy() for v in shared.variables]
    heads = [[v.numpy() for v in model.layers[1].variables] for model in models]
    slots = {}  # one of the shared layer for each optimiser, one of each head
    for _ in range(20):
        for i, model in enumerate(models):
            (w, b), (v, c) = common, heads[i]
            h = x @ w + b
            error = (h @ v + c - y) * 2 / y.size
            back = error @ v.T
            gradients = [x.T @ back, back.sum(0), h.T @ error, error.sum(0)]
            after = []
            for k, (p, g) in enumerate(zip([w, b, v, c], gradients, strict=True)):
                slot = slots.setdefault((k, 0 if same_optimizer and k < 2 else i), {})
                after.append(momentum(p, g, slot, 0, learning_rate=0.1, momentum=0.5))
            common, heads[i] = after[:2], after[2:]
            mean_square_step(model, chosen[i], x, y)
            for variable, value in zip(model.variables, after, strict=True):
                np.testing.assert_allclose(variable, value, rtol=1e-11, atol=1e-13)
    assert models[0].variables[0] is models[1].variables[0]


def test_overlapping_sets_of_two_optimizers():
    rng = np.random.default_rng(11)
    names = "abcde"
    values = {n: rng.normal(size=size) for n, size in zip(names, (3, 70, 2, 33, 1), strict=True)}
    variables = {n: tg.Variable(p, name=n) for n, p in values.items()}
    pairs = {"left": (made("adam"), "abc", {}), "right": (made("nesterov"), "edcb", {})}
    counts = {"left": 0, "right": 0}
    for turn in range(24):
        side = ("left", "right", "right")[turn % 3]
        (optimizer, formula), members, slots = pairs[side]
        counts[side] += 1
        gradients = {n: rng.normal(size=values[n].shape) for n in members}
        optimizer.apply_gradients([(gradients[n], variables[n]) for n in members])
        for n in members:
            slot = slots.setdefault(n, {})
            values[n] = formula(values[n], gradients[n], slot, counts[side])
        for n in names:
            np.testing.assert_allclose(variables[n], values[n], rtol=1e-12, atol=1e-14)


def test_variables_that_appear_later():
    rng = np.random.default_rng(13)
    optimizer, formula = made("adamw")
    values = [rng.normal(size=n) for n in (70, 3, 40)]
    variables = [tg.Variable(p) for p in values]
    slots = [{}, {}, {}]
    for t in range(1, 10):
        known = min(3, 1 + (t - 1) // 3)  # one more variable every third step
        gradients = [rng.normal(size=v.shape) for v in variables[:known]]
        optimizer.apply_gradients(list(zip(gradients, variables, strict=False)))
        for i, g in enumerate(gradients):  # t counts the optimiser's steps, not the variable's
            values[i] = formula(values[i], g, slots[i], t)
        for variable, value in zip(variables, values, strict=True):
            np.testing.assert_allclose(variable, value, rtol=1e-12, atol=1e-14)


# ---- how variables lie in the flat buffer


def owner(variable):
    return owner_of(variable._array)


def offset(variable):
    return (
        variable._array.__array_interface__["data"][0]
        - owner(variable).__array_interface__["data"][0]
    )


def packed(shapes, dtype=np.float64, seed=0):
    """Return variables that an optimiser has packed without changing them."""
    rng = np.random.default_rng(seed)
    variables = [
        tg.Variable(rng.normal(size=shape), dtype=dtype, name=f"v{i}")
        for i, shape in enumerate(shapes)
    ]
    optimizers.SGD(0.0).apply_gradients([(np.ones(v.shape, v.dtype), v) for v in variables])
    return variables


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_variables_share_one_buffer_in_units_of_256_bytes(dtype):
    variables = packed([(), (3,), (7, 5), (65,), (33, 9), (256,)], dtype)
    assert len({id(owner(v)) for v in variables}) == 1
    end = 0
    for variable in variables:
        assert offset(variable) % 256 == 0
        assert end <= offset(variable) < end + 256  # one behind the other, nothing wasted
        end = offset(variable) + variable.nbytes
    assert end <= owner(variables[0]).nbytes < end + 256
    assert owner(variables[0]).dtype == dtype


def test_each_dtype_has_a_buffer_of_its_own():
    kinds = [np.float32, np.float64, np.float32, np.float64]
    variables = [tg.Variable(np.ones(3), dtype=kind) for kind in kinds]
    optimizers.SGD(0.5).apply_gradients([(np.ones(3), v) for v in variables])
    owners = [id(owner(v)) for v in variables]
    assert owners[0] == owners[2]
    assert owners[1] == owners[3]
    assert owners[0] != owners[1]
    for variable, kind in zip(variables, kinds, strict=True):
        assert variable.dtype == kind
        np.testing.assert_array_equal(variable, np.full(3, 0.5))


def test_packing_changes_neither_values_nor_identity():
    rng = np.random.default_rng(1)
    before = [rng.normal(size=shape) for shape in SHAPES.values()]
    variables = [tg.Variable(p, name=f"v{i}") for i, p in enumerate(before)]
    ids = [v.id for v in variables]
    optimizers.SGD(0.0).apply_gradients([(np.ones(v.shape), v) for v in variables])
    for variable, p, identity in zip(variables, before, ids, strict=True):
        np.testing.assert_array_equal(variable, p)
        assert (variable.id, variable.shape, variable.trainable) == (identity, p.shape, True)


def test_a_second_optimizer_moves_nothing():
    first, second = packed([(3,), (70,)])
    late = tg.Variable(np.ones(4))
    places = [v._array.__array_interface__["data"][0] for v in (first, second)]
    optimizer = optimizers.Adam(0.5)
    optimizer.apply_gradients([(np.ones(v.shape), v) for v in (second, late, first)])
    optimizer.apply_gradients([(np.ones(v.shape), v) for v in (late, first)])
    assert [v._array.__array_interface__["data"][0] for v in (first, second)] == places
    assert owner(first) is owner(second)
    assert owner(late) is not owner(first)


@pytest.mark.parametrize("case", ["sgd", "nesterov", "adagrad", "rmsprop", "adamw"])
def test_a_step_reaches_no_other_variable_of_the_buffer(case):
    variables = packed([(3,), (31,), (1,), (70,)])
    optimizer, _ = made(case)
    before = [v.numpy() for v in variables]
    optimizer.apply_gradients([(np.ones(31), variables[1]), (np.ones(1), variables[2])])
    for i, variable in enumerate(variables):
        if i in (1, 2):
            assert (variable.numpy() != before[i]).all()
        else:
            np.testing.assert_array_equal(variable, before[i])


@pytest.mark.parametrize("first_step", [True, False])
def test_a_tape_keeps_the_values_from_before_the_step(first_step):
    p = np.random.default_rng(2).normal(size=(3, 4))
    v = tg.Variable(p)
    optimizer = optimizers.SGD(0.5)
    if not first_step:  # which packs; now the tape saves what lies in the buffer
        optimizer.apply_gradients([(np.ones((3, 4)), v)])
        p = p - 0.5
    with tg.GradientTape() as tape:
        y = tg.sum(v * v * v)
    optimizer.apply_gradients([(np.ones((3, 4)), v)])
    np.testing.assert_allclose(tape.gradient(y, v), 3 * p**2, rtol=1e-14)
    np.testing.assert_array_equal(v, p - 0.5)


VIEWS = {
    "read": lambda v: tg.reshape(v, v.shape),
    "transpose": lambda v: v.T,
    "row": lambda v: v[1],
    "slice": lambda v: v[1:, ::2],
    "reshape": lambda v: tg.reshape(v, (-1,)),
    "broadcast": lambda v: tg.broadcast_to(v, (2, *v.shape)),
    "view of a view": lambda v: tg.reshape(v.T[1:], (-1, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("first_step", [True, False])
def test_a_tensor_read_before_a_step_keeps_its_value(view, first_step):
    p = np.random.default_rng(3).normal(size=(3, 4))
    v, neighbour = tg.Variable(p), tg.Variable(np.ones(40))
    optimizer = optimizers.SGD(1.0, momentum=0.5)
    pairs = [(np.ones((3, 4)), v), (np.ones(40), neighbour)]
    if not first_step:
        optimizer.apply_gradients(pairs)
        p = p - 1.0
    look = VIEWS[view]
    with tg.GradientTape() as tape:
        held = look(v)
        y = tg.sum(held * held)
    expected = look(tg.constant(p)).numpy()
    beside = neighbour.value()
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    np.testing.assert_allclose(held, expected, rtol=1e-15)
    np.testing.assert_array_equal(beside, np.full(40, 1.0 if first_step else 0.0))
    with tg.GradientTape() as fresh:
        source = tg.constant(p)
        fresh.watch(source)
        again = look(source)
        z = tg.sum(again * again)
    np.testing.assert_allclose(tape.gradient(y, v), fresh.gradient(z, source), rtol=1e-14)
    assert (v.numpy() != p).all()


def test_assigning_a_packed_variable_leaves_its_neighbours_alone():
    first, second, third = packed([(3,), (5,), (2,)])
    values = [v.numpy() for v in (first, third)]
    held = first.value(), third.value()
    second.assign(np.full(5, 7.0))
    second[1:3].assign([8.0, 9.0])
    second.assign_add(np.ones(5))
    np.testing.assert_array_equal(second, [8.0, 9.0, 10.0, 8.0, 8.0])
    for variable, tensor, value in zip((first, third), held, values, strict=True):
        np.testing.assert_array_equal(variable, value)
        np.testing.assert_array_equal(tensor, value)


def test_copies_of_a_packed_variable_are_their_own():
    variable, other = packed([(100, 100), (3,)])
    value = variable.numpy()
    copies = [
        copy.copy(variable),
        copy.deepcopy(variable),
        pickle.loads(pickle.dumps(variable)),
        tg.Variable(variable),
    ]
    variable.assign_add(np.ones((100, 100)))
    for made_anew in copies:
        np.testing.assert_array_equal(made_anew, value)
        assert owner(made_anew) is not owner(variable)
    # Not the whole buffer with it.
    assert len(pickle.dumps(other)) < 2000


@pytest.fixture
def moves(monkeypatch):
    """Count the tensors that a write has to move out of its way."""
    counted = []
    original = _storage.Buffer.before_write

    def before_write(buffer, target):
        # The arrays are kept, not the tensors: one that nothing holds any more is not to be moved.
        arrays = [(ref, ref()._array) for ref in buffer._tensors if ref() is not None]
        original(buffer, target)
        for ref, array in arrays:
            tensor = ref()
            if tensor is not None and tensor._array is not array:
                counted.append(ref)

    monkeypatch.setattr(_storage.Buffer, "before_write", before_write)
    return counted


def test_a_hundred_training_steps_move_no_tensor(moves):
    x, y = data()
    model = tg.Sequential([linear(70, 1), tg.layers.Dense(2, "relu", dtype=np.float64)])
    optimizer = optimizers.Adam(0.01)
    model.build((None, 3))
    for _ in range(100):
        mean_square_step(model, optimizer, x, y)
    assert moves == []
    held = model.variables[0].value() + 0, model.variables[0].T  # the second shares its memory
    mean_square_step(model, optimizer, x, y)
    assert len(moves) == 1
    assert moves[0]() is held[1]


def test_fit_moves_no_tensor(moves):
    x, y = data()
    model = tg.Sequential([tg.layers.Dense(70, "relu"), tg.layers.Dropout(0.5), tg.layers.Dense(2)])
    model.compile("adam", "mse", ["mae"])
    model.fit(np.tile(x, (25, 1)), np.tile(y, (25, 1)), batch_size=4, epochs=2, verbose=0)
    assert moves == []


# ---- hyper-parameters and the rest of what users touch


def test_the_learning_rate_can_be_assigned():
    variable = tg.Variable(np.zeros(2))
    optimizer = optimizers.SGD(1.0)
    expected = 0.0
    for change in (
        lambda: None,
        lambda: setattr(optimizer, "learning_rate", 0.25),
        lambda: optimizer.learning_rate.assign(0.125),
        lambda: optimizer.learning_rate.assign_add(0.375),
        lambda: optimizer.learning_rate.assign(tg.constant(2.0)),
    ):
        change()
        expected -= float(optimizer.learning_rate)
        optimizer.apply_gradients([(np.ones(2), variable)])
        np.testing.assert_array_equal(variable, [expected, expected])
    assert expected == -(1.0 + 0.25 + 0.125 + 0.5 + 2.0)


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        ("momentum", "momentum", 0.25),
        ("adagrad", "epsilon", 0.5),
        ("rmsprop", "rho", 0.25),
        ("rmsprop", "epsilon", 0.5),
        ("adam", "beta_1", 0.25),
        ("adam", "beta_2", 0.25),
        ("adam", "epsilon", 0.5),
        ("adam", "weight_decay", 0.5),
    ],
)
def test_every_hyperparameter_can_be_assigned(case, name, value):
    optimizer, (_, plain, options) = made(case)[0], CASES[case]
    p, slots = np.array([1.0, -2.0]), {}
    variable = tg.Variable(p)
    for t in range(1, 5):
        if t == 3:
            setattr(optimizer, name, value)
            assert float(getattr(optimizer, name)) == value
        g = np.array([0.5, -1.0]) * t
        optimizer.apply_gradients([(g, variable)])
        changed = {name: value} if t >= 3 else {}
        p = plain(p, g, slots, t, **{**options, **changed})
        np.testing.assert_allclose(variable, p, rtol=1e-12)


def test_hyperparameters_are_float64():
    # In float32 the rate 0.1 would be off by 1.5e-9, and 1 - 0.999 by 1e-5 of itself.
    optimizer = optimizers.Adam(0.1)
    assert float(optimizer.learning_rate) == 0.1
    assert float(optimizer.beta_2) == 0.999
    assert optimizer.learning_rate.dtype == np.float64
    assert not optimizer.learning_rate.trainable


def test_structures_of_gradients_and_variables():
    a, b = tg.Variable([1.0]), tg.Variable(2.0)
    optimizer = optimizers.SGD(0.5)
    optimizer.apply({"a": tg.constant([2.0]), "b": [tg.constant(4.0)]}, {"a": a, "b": [b]})
    assert (a.tolist(), float(b)) == ([0.0], 0.0)
    with pytest.raises(ValueError, match=r"shorter|longer|structure"):
        optimizer.apply([tg.constant([2.0])], [a, b])


def test_structures_are_matched_by_their_keys():
    # By their order b was moved by the gradient of a.
    a, b = tg.Variable([0.0]), tg.Variable([[0.0]])
    same = tg.Variable([0.0])
    optimizers.SGD(1.0).apply(
        {"a": tg.constant([1.0]), "same": tg.constant([2.0]), "b": tg.constant([[3.0]])},
        {"same": same, "b": b, "a": a},
    )
    assert [float(tg.sum(v)) for v in (a, b, same)] == [-1.0, -3.0, -2.0]
    with pytest.raises(ValueError, match="gradients must have the structure of variables"):
        optimizers.SGD().apply([tg.constant([1.0])], [a, same])


def test_what_counts_as_a_gradient():
    variable = tg.Variable([0.0, 0.0], dtype=np.float32)
    optimizer = optimizers.SGD(1.0)
    for gradient in (
        [1.0, 2.0],
        np.array([1.0, 2.0]),
        tg.constant([1.0, 2.0], dtype=np.float64),
        tg.Variable([1.0, 2.0]),
        np.array([2.0, 9.0, 1.0])[::-2],
    ):
        variable.assign([0.0, 0.0])
        optimizer.apply_gradients([(gradient, variable)])
        np.testing.assert_array_equal(variable, [-1.0, -2.0])
        assert variable.dtype == np.float32


def test_a_gradient_that_is_the_variable_itself():
    variable = tg.Variable([4.0, -2.0])
    optimizer = optimizers.SGD(0.5)
    for expected in ([2.0, -1.0], [1.0, -0.5]):
        optimizer.apply_gradients([(variable, variable)])
        np.testing.assert_array_equal(variable, expected)


def test_a_step_is_not_recorded():
    variable = tg.Variable([1.0, 2.0])
    optimizer = optimizers.SGD(0.5)
    with tg.GradientTape() as tape:
        y = variable * variable
        optimizer.apply_gradients([([2.0, 2.0], variable)])
        z = tg.sum(y) + tg.sum(variable * 3.0)
    gradients = tape.gradient(z, variable)
    np.testing.assert_array_equal(gradients, [2 * 1.0 + 3.0, 2 * 2.0 + 3.0])


def test_a_step_inside_the_tapes_block_uses_the_old_and_the_new_value():
    v = tg.Variable([3.0])
    optimizer = optimizers.SGD(1.0)
    with tg.GradientTape(persistent=True) as tape:
        before = v * v
        optimizer.apply_gradients([([1.0], v)])
        after = v * v
    assert float(tape.gradient(before, v)) == 6.0
    assert float(tape.gradient(after, v)) == 4.0


def test_iterations_count_the_steps():
    variable, optimizer = tg.Variable([1.0]), optimizers.Adam()
    assert int(optimizer.iterations) == 0
    for n in range(1, 4):
        optimizer.apply_gradients([([1.0], variable)])
        assert int(optimizer.iterations) == n


def test_slots_are_copies():
    variable, optimizer = tg.Variable([1.0]), optimizers.SGD(1.0, momentum=0.5)
    optimizer.apply_gradients([([1.0], variable)])
    kept = optimizer.slot(variable, "velocity")
    optimizer.apply_gradients([([1.0], variable)])
    assert (kept.tolist(), optimizer.slot(variable, "velocity").tolist()) == ([-1.0], [-1.5])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sgd", optimizers.SGD),
        ("adagrad", optimizers.Adagrad),
        ("rmsprop", optimizers.RMSprop),
        ("adam", optimizers.Adam),
        ("adamw", optimizers.AdamW),
        ("AdamW", optimizers.AdamW),
    ],
)
def test_optimizers_by_name(name, kind):
    assert type(optimizers.get(name)) is kind
    assert optimizers.get(name) is not optimizers.get(name)
    given = kind()
    assert optimizers.get(given) is given


def test_what_an_optimizer_shows():
    assert repr(optimizers.SGD(0.5, momentum=0.25)) == "<SGD learning_rate=0.5, momentum=0.25>"
    assert optimizers.Adam(name="mine").name == "mine"
    assert optimizers.RMSprop().name == "rmsprop"


def test_no_state_is_shared_between_optimizers_of_a_kind():
    variables = [tg.Variable([0.0]), tg.Variable([0.0])]
    pair = [optimizers.SGD(1.0, momentum=0.5), optimizers.SGD(1.0, momentum=0.5)]
    for _ in range(2):
        pair[0].apply_gradients([([1.0], variables[0])])
    pair[1].apply_gradients([([1.0], variables[1])])
    assert [v.tolist() for v in variables] == [[-2.5], [-1.0]]


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optimizers.SGD(-0.1), r"SGD: learning_rate must be a number >= 0, got -0\.1"),
        (lambda: optimizers.SGD(float("nan")), "SGD: learning_rate must be a number >= 0, got nan"),
        (lambda: optimizers.Adam(float("inf")), "Adam: learning_rate must be .* got inf"),
        (lambda: optimizers.SGD(0.1, momentum=-1.0), "SGD: momentum must be .* >= 0, got -1"),
        (lambda: optimizers.SGD(0.1, nesterov=True), "SGD: nesterov needs a momentum above 0"),
        (lambda: optimizers.Adam(beta_1=1.0), "Adam: beta_1 must be from 0 to below 1, got 1"),
        (lambda: optimizers.Adam(beta_2=-0.5), r"Adam: beta_2 must be from 0 .* got -0\.5"),
        (lambda: optimizers.AdamW(beta_2=2.0), r"AdamW: beta_2 must be from 0 to below 1, got 2"),
        (lambda: optimizers.Adam(epsilon=-1e-8), "Adam: epsilon must be a number >= 0"),
        (lambda: optimizers.AdamW(weight_decay=-1.0), "AdamW: weight_decay must be .* got -1"),
        (lambda: optimizers.RMSprop(rho=1.5), r"RMSprop: rho must be .* below 1, got 1\.5"),
        (
            lambda: optimizers.Adagrad(initial_accumulator_value=-1.0),
            "Adagrad: initial_accumulator_value must be >= 0, got -1",
        ),
        (
            lambda: optimizers.Adagrad(initial_accumulator_value=float("nan")),
            "Adagrad: initial_accumulator_value must be >= 0, got nan",
        ),
        (lambda: optimizers.get("adma"), "one of sgd, adagrad, rmsprop, adam, adamw, got 'adma'"),
        (lambda: optimizers.get(optimizers.Adam), "optimizer must be an Optimizer or one of"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


V = tg.Variable([1.0, 2.0], name="v")
WHOLE = tg.Variable([1, 2], name="whole")


@pytest.mark.parametrize(
    ("pairs", "kind", "message"),
    [
        (lambda: [V], TypeError, r"grads_and_vars\[0\] must be a pair \(gradient, variable\), got"),
        (lambda: [([1.0, 1.0], V), (V,)], TypeError, r"grads_and_vars\[1\] must be a pair"),
        (
            lambda: [(V, tg.constant([1.0, 1.0]))],
            TypeError,
            r"grads_and_vars\[0\]\[1\] must be a Variable, got a Tensor: the gradient comes first",
        ),
        (
            lambda: [([1.0, 1.0], V), ([1.0, 1.0], V)],
            ValueError,
            "variable 'v' is given twice: add its gradients",
        ),
        (
            lambda: [([1.0, 1.0, 1.0], V)],
            ValueError,
            r"variable 'v' has shape \(2,\), its gradient \(3,\)",
        ),
        (lambda: [([[1.0, 1.0]], V)], ValueError, r"'v' has shape \(2,\), its gradient \(1, 2\)"),
        (lambda: [(1.0, V)], ValueError, r"variable 'v' has shape \(2,\), its gradient \(\)"),
        (list, ValueError, "no gradients were given: the model has no trainable variables"),
        (
            lambda: [([1.0, 1.0], V), ([1.0, 1.0], WHOLE)],
            TypeError,
            "variable 'whole' has dtype int64 and cannot be trained",
        ),
    ],
)
def test_pairs_that_are_refused_change_nothing(pairs, kind, message):
    optimizer = optimizers.SGD(1.0)
    with pytest.raises(kind, match=message):
        optimizer.apply_gradients(pairs())
    np.testing.assert_array_equal(V, [1.0, 2.0])
    np.testing.assert_array_equal(WHOLE, [1, 2])
    assert int(optimizer.iterations) == 0


def test_slots_that_are_not_there():
    variable, stranger = tg.Variable([1.0], name="mine"), tg.Variable([1.0], name="stranger")
    optimizer = optimizers.Adam()
    optimizer.apply_gradients([([1.0], variable)])
    with pytest.raises(KeyError, match="no slot 'velocity' for variable 'mine' in adam"):
        optimizer.slot(variable, "velocity")
    with pytest.raises(KeyError, match="no slot 'm' for variable 'stranger' in adam"):
        optimizer.slot(stranger, "m")


def test_copies_before_the_first_step_only():
    optimizer, variable = optimizers.Adam(0.1), tg.Variable([1.0])
    twin = copy.deepcopy(optimizer)
    twin.learning_rate.assign(0.5)
    for each in (optimizer, twin):
        each.apply_gradients([(tg.constant([1.0]), variable)])
    assert float(variable[0]) == pytest.approx(1.0 - 0.1 - 0.5)
    with pytest.raises(TypeError, match="an optimizer that has taken a step cannot be copied"):
        copy.deepcopy(optimizer)


def test_an_unknown_attribute():
    with pytest.raises(AttributeError, match="SGD has no attribute 'beta_1'"):
        _ = optimizers.SGD().beta_1


@pytest.mark.parametrize(
    ("optimizer", "name", "message"),
    [
        (optimizers.Adam(), "lr", "Adam has no setting 'lr', only learning_rate, beta_1, beta_2, "),
        (optimizers.SGD(), "learning_rat", "SGD has no setting 'learning_rat', only learning_rate"),
        (optimizers.Adam(), "momentum", "Adam has no setting 'momentum', only learning_rate, "),
    ],
)
def test_settings_that_would_change_nothing(optimizer, name, message):
    with pytest.raises(AttributeError, match=message):
        setattr(optimizer, name, 0.5)
    assert not hasattr(optimizer, name)
    optimizer.name = "mine"
    assert optimizer.name == "mine"


# ---- the norm of all gradients, and gradients of a scaled loss

CLIPPED = {
    "sgd": lambda **options: optimizers.SGD(0.1, **options),
    "nesterov": lambda **options: optimizers.SGD(0.1, momentum=0.9, nesterov=True, **options),
    "adagrad": lambda **options: optimizers.Adagrad(0.1, **options),
    "rmsprop": lambda **options: optimizers.RMSprop(0.1, **options),
    "adam": lambda **options: optimizers.Adam(0.1, **options),
    "adamw": lambda **options: optimizers.AdamW(0.1, **options),
}
CLIPPED_SHAPES = [((3, 4), "f4"), ((5,), "f8"), ((), "f4"), ((70_000,), "f4")]


def drawn_gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=s) * scale).astype(dtype) for s, dtype in CLIPPED_SHAPES]


def clipped(gradients, limit, scale):
    """By the definition: divided by the scale, then all by norm / limit if that is above 1."""
    gradients = [None if g is None else g.astype("f8") / scale for g in gradients]
    norm = np.sqrt(sum((g**2).sum() for g in gradients if g is not None))
    return [None if g is None else g / max(1.0, norm / limit) for g in gradients]


def after_steps(optimizer, steps, compile=False):
    variables = [tg.Variable(np.ones(shape, dtype)) for shape, dtype in CLIPPED_SHAPES]

    def step(*gradients):
        optimizer.apply(list(gradients), variables)

    run = tg.function(step) if compile else step
    for gradients in steps:
        run(*[g if g is None else tg.constant(g) for g in gradients])
    return [v.numpy() for v in variables]


def assert_nearly(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5 if a.dtype == "f4" else 1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize(("limit", "scale"), [(1.0, None), (None, 8.0), (0.5, 8.0), (1e9, 2.0)])
@pytest.mark.parametrize("compile", [False, True])
def test_clipped_and_scaled(name, limit, scale, compile):
    steps = [drawn_gradients(seed, 10.0**seed) for seed in range(4)]
    options = {"global_clipnorm": limit, "loss_scale_factor": scale}
    by_hand = [clipped(g, limit or np.inf, scale or 1.0) for g in steps]
    by_hand = [
        [g.astype(d) for g, (_, d) in zip(gs, CLIPPED_SHAPES, strict=True)] for gs in by_hand
    ]
    got = after_steps(CLIPPED[name](**options), steps, compile)
    assert_nearly(got, after_steps(CLIPPED[name](), by_hand))


def test_only_the_gradients_that_there_are_count():
    steps = [[None, *drawn_gradients(0)[1:3], None]]
    want = [g if g is None else np.asarray(g, CLIPPED_SHAPES[i][1])
            for i, g in enumerate(clipped(steps[0], 0.5, 1.0))]  # fmt: skip
    with pytest.warns(tg.TapeWarning):
        got = after_steps(optimizers.SGD(0.1, global_clipnorm=0.5), steps)
    with pytest.warns(tg.TapeWarning):
        assert_nearly(got, after_steps(optimizers.SGD(0.1), [want]))


def test_the_limit_and_the_scale_may_change():
    optimizer = optimizers.SGD(1.0, global_clipnorm=1.0, loss_scale_factor=1.0)
    v = tg.Variable([0.0, 0.0])
    step = tg.function(lambda g: optimizer.apply([g], [v]))
    for limit, scale, moved in [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (2.5, 1.0, 2.5), (9.0, 5.0, 1.0)]:
        optimizer.global_clipnorm = limit
        optimizer.loss_scale_factor = scale
        v.assign([0.0, 0.0])
        step(tg.constant([3.0, 4.0]))
        np.testing.assert_allclose(v.numpy(), [-0.6 * moved, -0.8 * moved], rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows(value):
    """limit / infinity is 0: the other variables would stand still, and nobody would know why."""
    v, w = tg.Variable([1.0]), tg.Variable([1.0, 1.0])
    optimizer = optimizers.SGD(0.1, global_clipnorm=1.0)
    optimizer.apply([tg.constant([value]), tg.constant([1.0, 1.0])], [v, w])
    assert np.isnan(v.numpy()).all()
    assert np.isnan(w.numpy()).all()


def test_norms_that_a_square_in_float32_would_not_hold():
    for size in (1e30, 1e-30):
        v = tg.Variable(np.zeros(2, "f4"))
        g = tg.constant(np.array([3 * size, 4 * size], "f4"))
        optimizers.SGD(1.0, global_clipnorm=size).apply([g], [v])
        np.testing.assert_allclose(v.numpy() / size, [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("name", ["global_clipnorm", "loss_scale_factor"])
def test_wrong_limits_and_scales(name):
    for value in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match=f"SGD: {name} must be above 0, got"):
            optimizers.SGD(**{name: value})
    with pytest.raises(AttributeError, match=f"SGD was made without {name}"):
        setattr(optimizers.SGD(), name, 1.0)
    assert float(getattr(optimizers.Adam(**{name: 2.0}), name)) == 2.0


def test_momentum_cannot_be_had_later():
    """There is nothing that would keep the velocity."""
    with pytest.raises(AttributeError, match="SGD was made without momentum: give it there"):
        optimizers.SGD().momentum = 0.9
    with pytest.raises(AttributeError, match="no attribute 'momentum'"):
        optimizers.SGD().momentum.assign(0.9)
    optimizer = optimizers.SGD(momentum=0.5)
    optimizer.momentum = 0.0
    assert float(optimizer.momentum) == 0.0


def test_averages_in_16_bits_have_room_for_large_gradients():
    variable = tg.Variable(np.ones(3, np.float16))
    optimizer = tg.optimizers.Adam(0.25)
    for _ in range(4):
        optimizer.apply([tg.constant(np.full(3, 200.0, np.float16))], [variable])
    np.testing.assert_allclose(variable.numpy(), 0.0, atol=5e-3)
    np.testing.assert_allclose(optimizer.slot(variable, "v").numpy(), 160.0, rtol=5e-3)
