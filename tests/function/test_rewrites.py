"""The rewrites of programs: what they leave out, and that values stay, switched on and off."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._function.update_calls import _Call, _joined
from tapegrad._host_memory import neighbours
from tests.function.compiled import assert_same, rewritten

X = tg.constant([0.5, 1.5, 2.5])


def text_of(function, *args):
    """Compile with two calls, check the third against the eager one, return the program's text."""
    f = tg.function(function)
    for _ in range(2):
        f(*args)
    assert_same(f(*args), function(*args))
    return f.explain_program()


def calls(text, name):
    return len(re.findall(rf"\b{name}\(", text))


def test_nothing_is_computed_in_vain():
    def f(x):
        tg.exp(x)
        tg.sum(tg.sin(x))
        return x * 2.0

    text = text_of(f, X)
    assert calls(text, "exp") == calls(text, "sin") == 0


def test_nothing_is_computed_twice():
    text = text_of(lambda x: (tg.exp(x) + tg.exp(x), tg.sin(tg.exp(x)), tg.exp(x * 2.0)), X)
    assert calls(text, "exp") == 2


def test_numbers_that_are_equal_and_not_the_same_are_kept_apart():
    with np.errstate(all="ignore"):
        text_of(lambda x: (x / 0.0, x / -0.0), X)
        text_of(lambda x: (tg.astype(x, "int64") * 1, tg.astype(x, "int64") * 1.0), X)
        text_of(lambda x: (tg.pad(x, 1, value=0.0), 1.0 / tg.pad(x, 1, value=-0.0)), X)
        text_of(lambda x: (x + 1, x + 1.0, x * True), X)
        text_of(lambda x: (tg.sum(x, axis=0), tg.sum(x[None], axis=1)), X)
        zeros = tg.constant([0.0, -0.0, 0.0])
        text_of(lambda x: (x / zeros, x * zeros, zeros - x * 0.0), X)


def test_reads_of_two_versions_are_kept_apart():
    v = tg.Variable([1.0, 2.0, 3.0])

    def f(x):
        a = tg.exp(v) * x
        v.assign_add(x)
        b = tg.exp(v) * x
        return a, b, tg.exp(v)

    compiled = tg.function(f)
    got = [compiled(X) for _ in range(4)]
    v.assign([1.0, 2.0, 3.0])
    assert_same(got, [f(X) for _ in range(4)])
    assert calls(compiled.explain_program(), "exp") == 2


def test_draws_are_kept_apart():
    f = tg.function(lambda: (tg.random.normal((3,)), tg.random.normal((3,))))
    for _ in range(4):
        a, b = f()
        assert not np.array_equal(a, b)


def test_constants_are_folded():
    c = tg.constant([1.0, 2.0, 3.0])
    text = text_of(lambda x: x * tg.exp(tg.sin(c) + 1.0) + tg.ones_like(x), X)
    assert calls(text, "exp") == calls(text, "sin") == 0


def test_constants_of_variables_are_not_folded():
    v = tg.Variable([1.0, 2.0, 3.0])
    f = tg.function(lambda x: x * tg.exp(v))
    for k in range(5):
        v.assign([1.0, 2.0, float(k)])
        assert_same(f(X), X * tg.exp(v))


def test_writes_come_last():
    v = tg.Variable([1.0, 2.0, 3.0])

    def f(x):
        before = tg.cos(v) * 0.0  # of the version before
        v.assign_add(x)
        return tg.exp(x), tg.sin(x), before

    text = text_of(f, X)
    lines = text.splitlines()
    first_write = next(i for i, line in enumerate(lines) if "try:" in line)
    for name in ("exp", "sin", "cos"):
        assert calls("\n".join(lines[:first_write]), name) == 1


def test_the_first_layer_has_no_input_gradient():
    w, u = (tg.Variable(np.random.default_rng(k).normal(size=(3, 3))) for k in range(2))

    def f(x):
        with tg.GradientTape() as tape:
            y = tg.sum(tg.tanh(x @ w) @ u)
        return tape.gradient(y, [w, u])

    with rewritten(False):
        text = text_of(f, tg.ones((4, 3), dtype="f8"))
    # x @ w, its gradient's two factors and the gradient of w; those of the sum are sums
    assert calls(text, "dot") + calls(text, "matmul") <= 5


# ---- rewrites that change the order of sums, on and off, over one step and several

WIDTHS = [
    (1, 1),
    (3, 2),
    (64, 32, 32, 10),
    (7, 1, 5),
    (20, 30, 40, 3),
    (5, 400, 4),
    (400, 120, 90, 3),
]


def network(widths, dtype, *, with_logits=True):
    """Return a training step of an MLP, and its Variables."""
    rng = np.random.default_rng(0)
    variables = []
    for n, m in itertools.pairwise(widths):
        variables.append(tg.Variable((rng.normal(size=(n, m)) / np.sqrt(n)).astype(dtype)))
        variables.append(tg.Variable(rng.normal(size=m).astype(dtype)))
    optimizer = tg.optimizers.SGD(0.1)

    def step(x, labels):
        with tg.GradientTape() as tape:
            for w, b in zip(variables[:-2:2], variables[1:-2:2], strict=True):
                x = tg.nn.linear_relu(x, w, b)
            y = tg.nn.linear(x, *variables[-2:])
            loss = tg.nn.softmax_cross_entropy(y, labels)
        gradients = tape.gradient(loss, variables)
        optimizer.apply(gradients, variables)
        return (loss, y) if with_logits else loss

    return step, variables


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("batch", [1, 2, 32, 100])
@pytest.mark.parametrize("widths", WIDTHS)
def test_networks_switched_on_and_off(widths, batch, dtype):
    rng = np.random.default_rng(1)
    batches = [
        (
            tg.constant(rng.normal(size=(batch, widths[0])).astype(dtype)),
            tg.constant(rng.integers(0, widths[-1], batch)),
        )
        for _ in range(6)
    ]
    runs = []
    for switch in (None, False, True):
        step, variables = network(widths, dtype)
        call = step if switch is None else tg.function(step)
        with rewritten(bool(switch)):
            results = [[y.numpy() for y in call(*arguments)] for arguments in batches]
        runs.append((results, [v.numpy() for v in variables]))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0], 1e-5 if dtype == "f4" else 1e-13)


@pytest.mark.parametrize(
    ("widths", "layers", "thin"),
    [
        ((20, 30, 30, 3), r"c\d+\.dot\(c\d+, c\d+\)", False),  # feature by feature, with ones
        ((400, 120, 90, 3), r"[xa]\d+\.dot\(c\d+, a\d+\)", False),  # by rows, and what follows
        ((5, 400, 4), r"c\d+\.dot\(c\d+, a\d+\)", True),
    ],
)
def test_products_suit_the_sizes_of_a_network(widths, layers, thin):
    rng = np.random.default_rng(1)
    x = tg.constant(rng.normal(size=(100, widths[0])))
    labels = tg.constant(rng.integers(0, widths[-1], 100))
    (step, variables), (compiled, others) = (
        network(widths, "f8", with_logits=False) for _ in range(2)
    )
    f = tg.function(compiled)
    for _ in range(4):
        assert_same((f(x, labels), others), (step(x, labels), variables), 1e-13)
    text = f.explain_program()
    products = re.findall(r".*\.dot\(.*", text)
    assert all(re.search(layers, product) for product in products[: len(widths) - 2])
    assert bool(re.search(r"(a\d+)\[\.\.\.\] = .*\n.*dot\(\1, ", text)) == thin
    # A mask is multiplied with what is stored as it is: else each call takes ten times as long.
    program = f.programs[0]
    names = {n: a for n, a in program._call.__globals__.items() if isinstance(a, np.ndarray)}
    for line in re.findall(r"multiply\((\w+), (\w+), (\w+)\)", text):
        arrays = [names[n] for n in line if n in names]  # but for a learning rate
        layouts = {array.flags.c_contiguous for array in arrays if array.ndim == 2}
        assert len(layouts) < 2, line


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("batch", [30, 32])  # 1 / 30 is not exact: then it is a call of its own
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("other", [-np.inf, -900.0, -5.0, 5.0, 50.0, 100.0, 900.0, np.inf, np.nan])
def test_losses_far_from_the_label(other, reduction, batch, dtype):
    """By classes exponentials are those of the logits: what overflows goes another way."""
    rng = np.random.default_rng(3)
    x = tg.constant(rng.normal(size=(batch, 4)).astype(dtype))
    w, b = tg.Variable(rng.normal(size=(4, 3)).astype(dtype)), tg.Variable(np.zeros(3, dtype))
    labels = tg.constant(rng.integers(0, 2, batch))
    offset = np.zeros((batch, 3), dtype)
    offset[7, 2] = other
    far, weights = tg.constant(offset), tg.constant(rng.normal(size=batch).astype(dtype))
    optimizer = tg.optimizers.SGD(0.0)

    def step(x, labels):
        with tg.GradientTape() as tape:
            y = tg.nn.linear(x, w, b) + far
            loss = tg.nn.softmax_cross_entropy(y, labels, reduction=reduction)
            total = tg.sum(loss * weights if reduction == "none" else loss)
        gradients = tape.gradient(total, [w, b])
        optimizer.apply(gradients, [w, b])
        return total, *gradients

    f = tg.function(step)
    with np.errstate(all="ignore"):
        want = step(x, labels)
        for _ in range(3):
            got = f(x, labels)
    text = f.explain_program()
    assert "carefully" in text
    assert "maximum_reduce" not in text
    # A logit of 100 is off by some 100 roundings before the exponential.
    assert_same(got, want, 2e-5 if dtype == "f4" else 1e-13)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("batch", [16, 4096])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 1.0), ("sum", 2.0**20)])
@pytest.mark.parametrize(
    # Of five equal logits of 88 the sum overflows alone; of 85 and 83, and of -80 and -86 in the
    # other direction, with the factor of a gradient of a mean.
    "offset",
    [-900.0, -100.0, -88.0, -86.0, -80.0, -60.0, 60.0, 80.0, 83.0, 85.0, 88.0, 900.0],
)
def test_logits_far_from_zero(offset, reduction, scale, batch, spread, dtype):
    """Softmax does not mind what is added to all logits; an exponential of them does."""
    rng = np.random.default_rng(3)
    labels = tg.constant(rng.integers(0, 5, batch))
    x = tg.constant(rng.normal(size=(batch, 4)).astype(dtype))
    w = tg.Variable((spread * rng.normal(size=(4, 5))).astype(dtype))
    b = tg.Variable(np.zeros(5, dtype))
    optimizer = tg.optimizers.SGD(0.0)

    @tg.function
    def step(x, offset):
        with tg.GradientTape() as tape:
            logits = tg.nn.linear(x, w, b) + offset
            loss = scale * tg.nn.softmax_cross_entropy(logits, labels, reduction=reduction)
        gradients = tape.gradient(loss, [w, b])
        optimizer.apply(gradients, [w, b])
        return loss, *gradients

    want = step(x, tg.zeros((batch, 5), dtype=dtype))
    far = tg.ones((batch, 5), dtype=dtype) * np.array(offset, dtype)
    for _ in range(3):
        got = step(x, far)
    assert "maximum_reduce" not in step.explain_program()
    # Sums of logit and offset are rounded; those of gradients over the batch cancel.
    roundings = 20 + 8 * spread * abs(offset)
    assert_same(got[0], want[0], roundings * np.finfo(dtype).eps)
    assert_same(got[1:], want[1:], (roundings + batch / 16) * np.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "far"), [("f4", 60.0), ("f8", 500.0)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_far_apart(reduction, dtype, far):
    """Each exponential is a number like others; their ratio is more than any."""
    x, labels = tg.constant(np.array([[far], [0.5]], dtype)), tg.constant([1, 0])
    w, b = tg.Variable(np.array([[1.0, -1.0]], dtype)), tg.Variable(np.zeros(2, dtype))
    optimizer = tg.optimizers.SGD(0.0)

    def step(x, labels):
        with tg.GradientTape() as tape:
            y = tg.nn.linear(x, w, b)
            loss = tg.sum(tg.nn.softmax_cross_entropy(y, labels, reduction=reduction))
        optimizer.apply(tape.gradient(loss, [w, b]), [w, b])
        return loss

    f = tg.function(step)
    for _ in range(4):
        assert_same(f(x, labels), step(x, labels), 4 * np.finfo(dtype).eps)
    assert "maximum_reduce" not in f.explain_program()


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
@pytest.mark.parametrize("logit", [-60.0, -75.0, -80.0, -86.0, -100.0])
def test_a_label_that_is_hardly_possible(logit, scale):
    labels = tg.constant([0, 0])
    w, b = tg.Variable([[1.0, 0.0]]), tg.Variable([0.0, 0.0])
    optimizer = tg.optimizers.SGD(0.0)

    @tg.function
    def step(x):
        with tg.GradientTape() as tape:
            y = tg.nn.linear(x, w, b)
            loss = scale * tg.nn.softmax_cross_entropy(y, labels, reduction="sum")
        optimizer.apply(tape.gradient(loss, [w, b]), [w, b])
        return loss

    for _ in range(3):
        loss = step(tg.constant([[logit], [logit]]))
    assert "maximum_reduce" not in step.explain_program()
    np.testing.assert_allclose(loss, -2 * logit * scale, rtol=4 * np.finfo("f4").eps)


@pytest.mark.parametrize("batch", [2, 3, 7])
def test_a_loss_near_zero_keeps_its_digits(batch):
    x = tg.constant(np.linspace(1.0, 3.3, batch, dtype="f4")[:, None])
    labels = tg.constant(np.zeros(batch, np.int64))
    w, b = tg.Variable(np.array([[9.0, -9.0]], "f4")), tg.Variable(np.zeros(2, "f4"))
    optimizer = tg.optimizers.SGD(0.0)

    @tg.function
    def step(x, labels):
        with tg.GradientTape() as tape:
            loss = tg.nn.softmax_cross_entropy(tg.nn.linear(x, w, b), labels)
        optimizer.apply(tape.gradient(loss, [w, b]), [w, b])
        return loss

    for _ in range(3):
        loss = step(x, labels)
    assert "maximum_reduce" not in step.explain_program()
    exact = np.log1p(np.exp(-18.0 * x.numpy())).mean()
    np.testing.assert_allclose(float(loss), exact, atol=np.finfo("f4").eps)


def test_memory_has_one_name():
    """NumPy takes twice as long where an output is an input's memory, but another object."""
    rng = np.random.default_rng(0)
    w = [tg.Variable(rng.normal(size=(32, 32)).astype("f4")) for _ in range(3)]
    biases = [tg.Variable(np.zeros(32, "f4")) for _ in range(3)]
    variables, optimizer = [*w, *biases], tg.optimizers.SGD(0.1)

    @tg.function
    def step(x):
        with tg.GradientTape() as tape:
            for kernel, bias in zip(w, biases, strict=True):
                x = tg.nn.linear_relu(x, kernel, bias)
            loss = tg.mean(tg.square(x))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    x = tg.constant(rng.normal(size=(32, 32)).astype("f4"))
    for _ in range(3):
        step(x)
    program = step.programs[0]
    names = set(re.findall(r"\b[ac]\d+\b", program.text))
    arrays = [program._call.__globals__[name] for name in names]
    shown = [
        (a.__array_interface__["data"][0], a.shape, a.strides, a.dtype.str)
        for a in arrays
        if isinstance(a, np.ndarray)
    ]
    assert len(shown) > 10
    assert len(set(shown)) == len(shown)


def test_captured_numbers_are_not_taken_for_each_other():
    """As NumPy's scalars they have no memory of their own that could tell which is which."""
    numbers = [tg.constant(float(k)) for k in range(20)]
    text_of(lambda x: [x * k for k in numbers] + [x[0] - k for k in numbers], X)


def classifier(widths, batch, parts=1):
    """Return a step that trains nets of these widths, together one with as many losses."""
    rng = np.random.default_rng(1)
    nets = [
        [
            (
                tg.Variable(rng.normal(size=shape).astype("f4")),
                tg.Variable(np.zeros(shape[1], "f4")),
            )
            for shape in itertools.pairwise(widths)
        ]
        for _ in range(parts)
    ]
    variables = [v for net in nets for layer in net for v in layer]
    optimizer = tg.optimizers.SGD(0.01)

    def step(x, labels):
        gradients, total = [], 0.0
        for net in nets:  # each net's gradient before the next one's outputs
            with tg.GradientTape() as tape:
                y = x
                for kernel, bias in net[:-1]:
                    y = tg.nn.linear_relu(y, kernel, bias)
                loss = tg.nn.softmax_cross_entropy(tg.nn.linear(y, *net[-1]), labels)
            gradients += tape.gradient(loss, [v for layer in net for v in layer])
            total = total + loss
        optimizer.apply(gradients, variables)
        return total

    x = tg.constant(rng.normal(size=(batch, widths[0])).astype("f4"))
    return step, variables, x, tg.constant(rng.integers(0, widths[-1], batch))


@pytest.mark.parametrize(
    ("widths", "parts", "signs"),
    [((4, 5, 3), 1, 1), ((4, 5, 6, 3), 1, 1), ((4, 5, 6, 7, 3), 1, 1), ((4, 5, 6, 3), 2, 3)],
)
def test_one_call_says_where_all_relus_are_zero(widths, parts, signs):
    """It waits for all of them: with two nets the first one's reverse pass does without."""
    runs = []
    for compile_it in (False, True):
        step, variables, x, labels = classifier(widths, 8, parts)
        call = tg.function(step) if compile_it else step
        losses = np.array([float(call(x, labels)) for _ in range(6)])
        runs.append((losses, variables))
    assert_same(runs[1], runs[0], 1e-5)
    assert call.explain_program().count("sign(") == signs


CHANGES = {
    "SGD": [("learning_rate", (0.5, 1.0, 0.0, 0.25))],
    "momentum": [("learning_rate", (0.5, 1.0, 0.0)), ("momentum", (1.0, 0.0, 0.5))],
    "Adagrad": [("learning_rate", (1.0, 0.0, 0.1)), ("epsilon", (0.0, 1e-60, 1.0))],
    "RMSprop": [("rho", (0.5, 0.0, 0.9)), ("epsilon", (0.0, 1e-60, 1.0, 1e-3))],
    "Adam": [
        ("weight_decay", (0.1, 0.0)),
        ("beta_1", (0.0, 0.5, 0.9)),
        ("beta_2", (0.0, 0.5, 0.999)),
        ("epsilon", (0.0, 1e-60, 1.0, 1e-8)),
        ("learning_rate", (1.0, 0.0, 1e-3)),
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_updates_written_out_follow_every_hyper_parameter(name):
    """What a rule leaves out for numbers that are 0 or 1 comes back when they are so no longer."""

    def training():
        w = tg.Variable(np.array([1.0, -2.0, 0.0, 3.0], "f4"))
        make = tg.optimizers.SGD if name == "momentum" else getattr(tg.optimizers, name)
        optimizer = make(momentum=0.9) if name == "momentum" else make()

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(w * w * x)
            optimizer.apply([tape.gradient(loss, w)], [w])

        return w, optimizer, step

    (w, optimizer, step), (v, other, plain) = training(), training()
    compiled = tg.function(step)
    x = tg.constant([1.0, 0.5, 0.0, 2.0])
    changes = [(key, value) for key, values in CHANGES[name] for value in values]
    for key, value in [(None, None)] * 4 + changes:
        if key is not None:
            setattr(optimizer, key, value)
            setattr(other, key, value)
        for _ in range(2):
            compiled(x)
            plain(x)
        assert_same(w, v)
    assert "multiply(" in compiled.explain_program().partition("else:")[2]


@pytest.mark.parametrize("size", [1, 70])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    ("first", "then", "counts"),
    [
        # Of keep_m * m, m + g, g * g, keep_v * v, v + g * g two are gone; the rate, and epsilon.
        ((0.9, 0.999), (0.9, 0.999), [4 - 1, 3 - 1]),
        # In units of other factors g and g * g are multiplied first, in the same memory.
        ((0.8, 0.99), (0.7, 0.9), [6 - 1, 3]),
    ],
)
def test_calls_on_neighbours_are_one(first, then, counts, dtype, size):
    """Adam's two averages lie side by side: up to two calls fewer, whatever their factors are."""

    def training():
        w = tg.Variable(np.linspace(-1.0, 1.0, size, dtype=dtype))
        optimizer = tg.optimizers.Adam()

        def step(x):
            with tg.GradientTape() as tape:
                loss = tg.sum(w * w * x)
            optimizer.apply([tape.gradient(loss, w)], [w])

        return w, optimizer, step

    (w, optimizer, step), (v, other, plain) = training(), training()
    x = tg.constant(np.linspace(0.0, 2.0, size, dtype=dtype))
    for call in (step, plain):
        call(x)  # the averages' units are of the first factors
    compiled = tg.function(step)
    for betas in (first, first, first, then, first, then):
        for o in (optimizer, other):
            o.beta_1, o.beta_2 = betas
        compiled(x)
        plain(x)
        assert_same(w, v)
    calls = compiled.explain_program().partition("else:")[2]
    assert [calls.count(f"{name}(") for name in ("multiply", "add")] == counts


def test_calls_on_neighbours_keep_their_order():
    """What one call writes and another reads between the two of them is not gone past."""
    a, b, c, d = (x.reshape(-1) for x in neighbours(4, "f4", [1.0, 2.0, 3.0, 4.0]))
    numbers = SimpleNamespace(spread=lambda first, second, size: None)

    def joined(*calls):
        return [
            (call.ufunc, [x.size for x in call.operands])
            for call in _joined([_Call(name, list(operands)) for name, *operands in calls], numbers)
        ]

    pair = [("exp", [8, 8])]
    assert joined(("exp", a, c), ("exp", b, d)) == pair
    assert joined(("exp", a, c), ("sqrt", a, a), ("exp", b, d)) == [*pair, ("sqrt", [4, 4])]
    assert joined(("exp", a, c), ("sqrt", b, b), ("exp", b, d)) == [("sqrt", [4, 4]), *pair]
    assert len(joined(("exp", a, c), ("add", a, b, a), ("sqrt", b, b), ("exp", b, d))) == 4
    assert len(joined(("exp", a, b), ("exp", b, c))) == 2
    assert len(joined(("exp", b, d), ("exp", a, c))) == 2
    assert len(joined(("exp", a, c), ("sqrt", b, d))) == 2


def test_an_update_that_is_more_than_ufuncs_is_called():
    """Without an epsilon what never had a gradient is told apart: 0 / 0 would move it."""
    x = tg.constant([1.0, 0.0])
    found = []
    for compile_it in (False, True):
        w, optimizer = tg.Variable([1.0, 2.0]), tg.optimizers.Adam(0.1, epsilon=0.0)

        def step(x, w=w, optimizer=optimizer):
            with tg.GradientTape() as tape:
                loss = tg.sum(w * x)
            optimizer.apply([tape.gradient(loss, w)], [w])

        call = tg.function(step) if compile_it else step
        for _ in range(4):
            call(x)
        found.append(w.numpy())
    assert_same(*found)
    assert found[0][1] == 2.0
    assert "else:" not in call.explain_program()


def test_what_is_often_careful_begins_so_for_a_while():
    """Eight times both ways, then 128 times the careful one alone, and from the beginning again."""
    w, b = tg.Variable([[1.0, -1.0]]), tg.Variable([0.0, 0.0])
    optimizer = tg.optimizers.SGD(0.0)

    def step(x, labels):
        with tg.GradientTape() as tape:
            loss = tg.nn.softmax_cross_entropy(tg.nn.linear(x, w, b), labels)
        optimizer.apply(tape.gradient(loss, [w, b]), [w, b])
        return loss

    f = tg.function(step)
    near, far, labels = tg.constant([[1.0]]), tg.constant([[90.0]]), tg.constant([1])
    for _ in range(3):
        f(near, labels)
    (program,) = f.programs
    quick = program._call

    def beginnings(x, calls):
        """Return how many of so many calls began the quick way, all of them right."""
        want, found = step(x, labels), 0
        for _ in range(calls):
            found += program._call is quick
            assert_same(f(x, labels), want, 1e-6)
        return found

    assert beginnings(near, 5) == 5
    assert beginnings(far, 8 + 128) == 8
    assert beginnings(near, 5) == 5
    assert beginnings(far, 8 + 100) == 8
    assert beginnings(near, 30) == 2


def ones_with_a_nan():
    x = np.ones((2, 3))
    x[0, 0] = np.nan
    return tg.constant(x)


@pytest.mark.parametrize("hides", ["zero upstream", "label that is ignored"])
def test_a_nan_that_no_result_shows(hides):
    """ReLU's gradient is 0 at NaN, also where no result of the step says that there is one."""
    mask, labels = tg.constant([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]), tg.constant([9, 1])

    def step(x, q):
        with tg.GradientTape() as tape:
            tape.watch([x, q])
            h = tg.nn.relu(x)
            if hides == "zero upstream":
                loss = shown = tg.sum(mask * (h * q))
            else:
                loss = shown = tg.nn.softmax_cross_entropy(h * q, labels, ignore_label=9)
            loss = loss + tg.sum(3.0 * h)
        of_x, of_q = tape.gradient(loss, [x, q])
        return (tg.sum(of_q) if hides == "zero upstream" else shown), of_x

    x, q = tg.ones((2, 3), dtype="f8"), tg.constant(np.full((2, 3), 2.0))
    f = tg.function(step)
    for given in (x, x, x, ones_with_a_nan(), x):
        want = step(given, q)
        assert_same(f(given, q), want, 1e-14)
    assert not np.isnan(want[0])


def test_zeros_of_both_signs_are_no_single_number():
    zeros = tg.constant([0.0, -0.0, 0.0])
    with np.errstate(divide="ignore"):
        text_of(lambda x: (x / zeros, tg.where(x > 0.0, -zeros, x * 0.0) + zeros), X)


@pytest.mark.parametrize("features", [1, 3])
def test_one_example_and_one_output_keep_what_is_not_finite(features):
    """The gradient of a kernel is NaN where 0 meets infinity, also beside that of the bias."""
    w, b = tg.Variable(-np.ones((features, 1))), tg.Variable(np.zeros(1))
    optimizer = tg.optimizers.SGD(0.1)

    def step(x):
        with tg.GradientTape() as tape:
            loss = tg.sum(3.0 * tg.nn.linear_relu(x, w, b))
        gradients = tape.gradient(loss, [w, b])
        optimizer.apply(gradients, [w, b])
        found = [loss, +w, +b]
        w.assign(-np.ones((features, 1)))
        return found

    f = tg.function(step)
    for value in (1.0, 1.0, 1.0, np.inf, 2.0):
        x = tg.constant(np.full((1, features), value))
        with np.errstate(invalid="ignore"):
            want = step(x)
            assert_same(f(x), want, 1e-14)
        assert np.isnan(want[1]).all() == (value == np.inf)
