"""Losses and metrics against plain NumPy, SciPy and pure Python, at ordinary and extreme inputs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

import tapegrad as tg
from tapegrad import losses, metrics, nn

RNG = np.random.default_rng(0)
EPS = {np.dtype(kind): np.finfo(kind).eps for kind in (np.float32, np.float64)}


def logits_of(n, classes, scale=3.0, seed=0):
    return np.random.default_rng(seed).normal(scale=scale, size=(n, classes))


def probabilities_of(n, classes, seed=1):
    return np.random.default_rng(seed).dirichlet(np.ones(classes), n)


def labels_of(n, classes, seed=2):
    return np.random.default_rng(seed).integers(0, classes, n)


def close(tensor, expected, rtol=1e-12, atol=1e-13):
    assert isinstance(tensor, tg.Tensor)
    assert tensor.shape == np.shape(expected)
    np.testing.assert_allclose(tensor, expected, rtol=rtol, atol=atol)


# ---- regression losses

T, P = RNG.normal(size=(6, 5)), RNG.normal(scale=2.0, size=(6, 5))


def plain_huber(t, p, delta):
    def one(e):
        return 0.5 * e * e if abs(e) <= delta else delta * (abs(e) - 0.5 * delta)

    return [[one(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(t, p, strict=True)]


def test_squared_absolute_and_huber_loss():
    close(losses.mean_squared_error(T, P), ((T - P) ** 2).mean(-1))
    close(losses.mean_absolute_error(T, P), np.abs(T - P).mean(-1))
    for delta in (0.25, 1.0, 7.5):
        close(losses.huber(T, P, delta), np.mean(plain_huber(T, P, delta), -1))
        close(losses.huber(T, P, delta), special.huber(delta, T - P).mean(-1))


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3))
def test_huber_at_sampled_numbers(t, p, delta):
    expected = plain_huber([[t]], [[p]], delta)[0]
    close(losses.huber(np.array([[t]]), np.array([[p]]), delta), expected, rtol=1e-9, atol=1e-9)


def test_the_gradients_of_regression_losses():
    p = tg.Variable(P)
    for function, slope in (
        (losses.mean_squared_error, 2 * (P - T)),
        (losses.mean_absolute_error, np.sign(P - T)),
        (losses.huber, np.clip(P - T, -1, 1)),
    ):
        with tg.GradientTape() as tape:
            loss = tg.sum(function(T, p))
        close(tape.gradient(loss, p), slope / 5)


def test_large_errors_do_not_overflow_in_huber():
    # The square of the error is not taken there, and must not warn either.
    p = tg.Variable(np.array([[1e200, -0.5]]))
    with tg.GradientTape() as tape:
        loss = losses.huber(np.array([[-1e200, 0.0]]), p)
    close(loss, [(2e200 + 0.125) / 2])
    close(tape.gradient(loss, p), [[0.5, -0.25]])


SHAPES = [
    ((4,), (4,)),
    ((4,), (4, 1)),
    ((4, 1), (4,)),
    ((4, 1), (4, 1)),
    ((), ()),
    ((2, 3, 4),) * 2,
]


@pytest.mark.parametrize(("t_shape", "p_shape"), SHAPES)
def test_shapes_that_go_together(t_shape, p_shape):
    t, p = RNG.normal(size=t_shape), RNG.normal(size=p_shape)
    squared = (t.reshape(p_shape) - p) ** 2
    close(losses.mean_squared_error(t, p), squared.mean(-1) if p_shape else squared)


@pytest.mark.parametrize(
    ("t_shape", "p_shape"),
    [((4,), (1, 4)), ((4, 1), (1, 4)), ((3,), (4,)), ((4, 2), (4,)), ((1,), (4, 1))],
)
@pytest.mark.parametrize(
    "name",
    [
        "mean_squared_error",
        "mean_absolute_error",
        "huber",
        "categorical_crossentropy",
        "binary_crossentropy",
        "kl_divergence",
    ],
)
def test_shapes_that_do_not(name, t_shape, p_shape):
    # Broadcasting (4, 1) against (1, 4) would train on 16 errors that nobody meant.
    with pytest.raises(ValueError, match=rf"\[{name}\] y_true and y_pred must have one shape, got"):
        getattr(losses, name)(np.ones(t_shape), np.ones(p_shape))


@pytest.mark.parametrize("name", ["mean_squared_error", "mean_absolute_error", "huber"])
def test_integer_predictions_do_not_truncate_the_targets(name):
    function = getattr(losses, name)
    t, p = [[0.5, 1.75]], [[1, 1]]
    expected = {"mean_squared_error": 0.40625, "mean_absolute_error": 0.625, "huber": 0.203125}
    close(function(np.array(t), np.array(p)), [expected[name]])


def test_integer_targets_and_float32_predictions():
    found = losses.mean_squared_error([[1, 3]], tg.constant([[0.5, 1.0]]))
    assert found.dtype == np.float32
    close(found, [(0.25 + 4.0) / 2])


@pytest.mark.parametrize("loss", [losses.categorical_crossentropy, losses.binary_crossentropy])
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_label_smoothing_is_a_share(loss, from_logits, smoothing):
    with pytest.raises(ValueError, match=r"_crossentropy\] label_smoothing must be from 0 to 1"):
        loss(np.eye(2), np.eye(2), from_logits, smoothing)


def test_huber_wants_a_positive_delta():
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"\[huber\] delta must be above 0, got"):
            losses.huber(T, P, delta)


# ---- cross-entropies


def test_sparse_categorical_crossentropy():
    x, y = logits_of(9, 4), labels_of(9, 4)
    expected = -special.log_softmax(x, -1)[np.arange(9), y]
    close(losses.sparse_categorical_crossentropy(y, x, from_logits=True), expected)
    close(losses.sparse_categorical_crossentropy(y, special.softmax(x, -1)), expected)
    close(losses.sparse_categorical_crossentropy(y[:, None], x, from_logits=True), expected)
    deep = losses.sparse_categorical_crossentropy(y.reshape(3, 3), x.reshape(3, 3, 4), True)
    close(deep, expected.reshape(3, 3))


def test_probabilities_that_do_not_sum_to_1():
    """They are divided by their sum, as with Keras: for both kinds of targets, and in gradients."""
    rng = np.random.default_rng(3)
    p, y = rng.uniform(0.05, 0.4, (5, 3)), np.array([0, 2, 1, 1, 0])
    t = np.eye(3)[y]
    expected = -np.log(p[np.arange(5), y] / p.sum(1))
    slope = 1 / p.sum(1, keepdims=True) - t / p
    for loss, target in (
        (losses.sparse_categorical_crossentropy, y),
        (losses.categorical_crossentropy, t),
    ):
        x = tg.Variable(p)
        with tg.GradientTape() as tape:
            value = loss(target, x)
        close(value, expected)
        close(tape.gradient(value, x), slope)


def test_categorical_crossentropy():
    x, t = logits_of(9, 4), probabilities_of(9, 4)
    expected = -(t * special.log_softmax(x, -1)).sum(-1)
    close(losses.categorical_crossentropy(t, x, from_logits=True), expected)
    close(losses.categorical_crossentropy(t, special.softmax(x, -1)), expected)
    smooth = 0.7 * t + 0.3 / 4
    expected = -(smooth * special.log_softmax(x, -1)).sum(-1)
    close(losses.categorical_crossentropy(t, x, True, label_smoothing=0.3), expected)
    close(losses.categorical_crossentropy(t, special.softmax(x, -1), False, 0.3), expected)


def test_binary_crossentropy():
    x, t = logits_of(9, 4), RNG.uniform(size=(9, 4))
    log_p, log_q = special.log_expit(x), special.log_expit(-x)
    expected = -(t * log_p + (1 - t) * log_q).mean(-1)
    close(losses.binary_crossentropy(t, x, from_logits=True), expected)
    close(losses.binary_crossentropy(t, special.expit(x)), expected, rtol=1e-10)
    smooth = 0.8 * t + 0.1
    expected = -(smooth * log_p + (1 - smooth) * log_q).mean(-1)
    close(losses.binary_crossentropy(t, x, True, label_smoothing=0.2), expected)
    close(losses.binary_crossentropy(t, special.expit(x), False, 0.2), expected, rtol=1e-10)


def test_kl_divergence():
    t, p = probabilities_of(9, 4), probabilities_of(9, 4, seed=5)
    close(losses.kl_divergence(t, p), special.rel_entr(t, p).sum(-1))
    hard = np.eye(4)[[0, 3]]
    close(losses.kl_divergence(hard, p[:2]), -np.log([p[0, 0], p[1, 3]]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_zero_and_one_stay_finite(dtype):
    most = -math.log(EPS[np.dtype(dtype)])
    sure = np.array([[0.0, 1.0], [1.0, 0.0]], dtype)
    target = np.array([[1.0, 0.0], [1.0, 0.0]], dtype)
    for function in (losses.categorical_crossentropy, losses.kl_divergence):
        close(function(target, sure), [most, 0.0], rtol=1e-6, atol=1e-6)
    sparse = losses.sparse_categorical_crossentropy([0, 0], sure)
    close(sparse, [most, 0.0], rtol=1e-6, atol=1e-6)
    close(losses.binary_crossentropy(target, sure), [most, 0.0], rtol=1e-6, atol=1e-6)
    close(losses.binary_crossentropy(sure, sure), [0.0, 0.0], atol=1e-6)
    for function in (
        losses.categorical_crossentropy,
        losses.kl_divergence,
        losses.binary_crossentropy,
    ):
        p = tg.Variable(sure)
        with tg.GradientTape() as tape:
            loss = tg.sum(function(target, p))
        assert np.isfinite(tape.gradient(loss, p)).all()


def test_extreme_logits():
    x = np.array([[1e4, 0.0, -1e4], [-1e308, 0.0, 0.0], [800.0, 800.0, -math.inf]])
    close(
        losses.sparse_categorical_crossentropy([2, 1, 0], x, from_logits=True),
        [2e4, math.log(2), math.log(2)],
    )
    close(losses.sparse_categorical_crossentropy([0, 0, 1], x, True)[:1], [0.0])
    target = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    close(losses.categorical_crossentropy(target, x, True), [2e4, math.log(2), math.log(2)])
    wide = np.array([[1e4, -1e4]])
    close(losses.binary_crossentropy(np.array([[1.0, 0.0]]), wide, True), [0.0])
    close(losses.binary_crossentropy(np.array([[0.0, 1.0]]), wide, True), [1e4])


def test_accuracy_far_from_zero():
    # 1 + exp(-40) is 1 in float64, and yet the loss is exp(-40), not 0.
    close(
        losses.binary_crossentropy([[1.0]], np.array([[40.0]]), True), [math.exp(-40)], rtol=1e-12
    )
    close(
        nn.sigmoid_cross_entropy(np.array([40.0]), [1.0], reduction="none"), [math.exp(-40)], 1e-12
    )


def test_ignored_labels_count_nothing():
    x, y = logits_of(8, 3), labels_of(8, 3)
    y[[1, 4, 5]] = -1
    each = np.array(
        [0.0 if k < 0 else -special.log_softmax(r)[k] for r, k in zip(x, y, strict=True)]
    )
    close(losses.sparse_categorical_crossentropy(y, x, True, ignore_class=-1), each)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    close(loss(y, x), each.sum() / 5)
    weights = RNG.uniform(size=8)
    close(loss(y, x, weights), (weights * each).sum() / 5)
    summed = losses.SparseCategoricalCrossentropy(True, -1, reduction="sum")
    close(summed(y, x), each.sum())
    close(loss(np.full(8, -1), x), 0.0)  # all ignored: 0, not 0 / 0


def test_an_ignored_class_that_is_a_class():
    x, y = logits_of(8, 3), labels_of(8, 3)
    each = np.where(y == 2, 0.0, -special.log_softmax(x, -1)[np.arange(8), y])
    assert (y == 2).any()
    close(losses.SparseCategoricalCrossentropy(True, 2)(y, x), each.sum() / (y != 2).sum())


def test_label_errors():
    x = logits_of(3, 4)
    with pytest.raises(
        TypeError, match=r"labels must be integers, got float64: .*categorical_cross"
    ):
        losses.sparse_categorical_crossentropy(np.array([0.0, 1.0, 2.0]), x)
    with pytest.raises(ValueError, match="labels must be from 0 to 3, got 4"):
        losses.sparse_categorical_crossentropy([0, 4, 1], x, from_logits=True)
    with pytest.raises(ValueError, match="labels must be from 0 to 3, got -2"):
        losses.sparse_categorical_crossentropy([0, -1, -2], x, True, ignore_class=-1)
    with pytest.raises(ValueError, match=r"labels must (be integers of|have) shape \(3,\)"):
        losses.sparse_categorical_crossentropy([0, 1], x, from_logits=True)


# ---- the fused cross-entropy's options, by PyTorch's documented formulas in pure Python


def plain_cross_entropy(x, y, *, weights=None, smoothing=0.0, ignore=None, reduction="mean"):
    """torch.nn.CrossEntropyLoss as documented; for labels, or for probabilities (2-D y)."""
    classes = len(x[0])
    weights = [1.0] * classes if weights is None else weights
    each, divisor = [], 0.0
    for row, target in zip(x, y, strict=True):
        top = max(row)
        log_sum = top + math.log(sum(math.exp(v - top) for v in row))
        log_p = [v - log_sum for v in row]
        if np.ndim(target) == 0:
            if target == ignore:
                each.append(0.0)
                continue
            hard = -weights[target] * log_p[target]
            soft = -sum(w * v for w, v in zip(weights, log_p, strict=True)) / classes
            each.append((1 - smoothing) * hard + smoothing * soft)
            divisor += weights[target]
        else:
            mixed = [(1 - smoothing) * t + smoothing / classes for t in target]
            each.append(-sum(w * t * v for w, t, v in zip(weights, mixed, log_p, strict=True)))
            divisor += 1.0
    return {"none": each, "sum": sum(each), "mean": sum(each) / (divisor or 1.0)}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore", [None, -100, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_cross_entropy_of_labels(weighted, smoothing, ignore, reduction):
    x, y = logits_of(10, 4), labels_of(10, 4)
    if ignore == -100:
        y[::3] = -100
    weights = np.array([0.5, 2.0, 1.25, 3.0]) if weighted else None
    options = {"label_smoothing": smoothing, "class_weights": weights, "reduction": reduction}
    found = nn.softmax_cross_entropy(x, y, ignore_label=ignore, **options)
    expected = plain_cross_entropy(
        x, y, weights=weights, smoothing=smoothing, ignore=ignore, reduction=reduction
    )
    close(found, expected)
    # While a tape records, another primitive runs: the loss is the same.
    v = tg.Variable(x)
    with tg.GradientTape():
        close(nn.softmax_cross_entropy(v, y, ignore_label=ignore, **options), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_cross_entropy_of_probabilities(weighted, smoothing, reduction):
    x, t = logits_of(10, 4), probabilities_of(10, 4)
    weights = np.array([0.5, 2.0, 1.25, 3.0]) if weighted else None
    options = {"label_smoothing": smoothing, "class_weights": weights, "reduction": reduction}
    expected = plain_cross_entropy(x, t, weights=weights, smoothing=smoothing, reduction=reduction)
    close(nn.softmax_cross_entropy(x, t, **options), expected)
    v = tg.Variable(x)
    with tg.GradientTape():
        close(nn.softmax_cross_entropy(v, t, **options), expected)


@pytest.mark.parametrize("options", [{}, {"ignore_label": 1}, {"class_weights": [1.0, 2.0, 0.5]}])
@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u1", "u2", "u4", "u8"])
def test_softmax_cross_entropy_of_labels_of_every_type(kind, options):
    x, y = tg.Variable(logits_of(10, 3)), labels_of(10, 3)
    found = []
    for labels in (y, y.astype(kind)):
        with tg.GradientTape() as tape:
            loss = tg.nn.softmax_cross_entropy(x, labels, **options)
        found.append((float(loss), tape.gradient(loss, x).numpy().tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_softmax_cross_entropy(kind, smoothing, weighted):
    x = logits_of(6, 4)
    y = labels_of(6, 4) if kind == "labels" else probabilities_of(6, 4)
    weights = np.array([0.5, 2.0, 1.25, 3.0]) if weighted else None
    ignore = int(y[0]) if kind == "labels" else None
    v = tg.Variable(x)
    with tg.GradientTape() as tape:
        loss = nn.softmax_cross_entropy(
            v, y, label_smoothing=smoothing, class_weights=weights, ignore_label=ignore
        )
    found = tape.gradient(loss, v).numpy()
    for i, k in np.ndindex(x.shape):  # central differences of the pure Python formula
        h = np.zeros_like(x)
        h[i, k] = 1e-6
        values = [
            plain_cross_entropy(x + s * h, y, weights=weights, smoothing=smoothing, ignore=ignore)
            for s in (1, -1)
        ]
        assert found[i, k] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-8)


def test_softmax_cross_entropy_of_more_axes():
    x, y = logits_of(12, 4), labels_of(12, 4)
    each = plain_cross_entropy(x, y, reduction="none")
    deep = nn.softmax_cross_entropy(x.reshape(2, 6, 4), y.reshape(2, 6), reduction="none")
    close(deep, np.reshape(each, (2, 6)))
    close(nn.softmax_cross_entropy(x.reshape(2, 6, 4), y.reshape(2, 6)), np.mean(each))
    close(nn.softmax_cross_entropy(x[0], int(y[0])), each[0])


def test_masked_logits():
    x = np.array([[0.0, -math.inf, 1.0]])
    expected = math.log(1 + math.e)
    close(nn.softmax_cross_entropy(x, [0]), expected)
    close(nn.softmax_cross_entropy(x, np.array([[1.0, 0.0, 0.0]])), expected)
    assert float(nn.softmax_cross_entropy(x, [1])) == math.inf
    v = tg.Variable(x)
    with tg.GradientTape() as tape:
        loss = nn.softmax_cross_entropy(v, [0])
    p = math.e / (1 + math.e)
    close(tape.gradient(loss, v), [[-p, 0.0, p]])


def test_sigmoid_cross_entropy():
    x, t = logits_of(5, 3), RNG.uniform(size=(5, 3))
    each = -(t * special.log_expit(x) + (1 - t) * special.log_expit(-x))
    close(nn.sigmoid_cross_entropy(x, t, reduction="none"), each)
    close(nn.sigmoid_cross_entropy(x, t, reduction="sum"), each.sum())
    close(nn.sigmoid_cross_entropy(x, t), each.mean())
    v = tg.Variable(x)
    with tg.GradientTape() as tape:
        loss = nn.sigmoid_cross_entropy(v, t)
    close(tape.gradient(loss, v), (special.expit(x) - t) / 15)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, y: nn.softmax_cross_entropy(y, y), TypeError, "logits must be floating"),
        (lambda x, y: nn.softmax_cross_entropy(1.0, 0), TypeError, r"\(\.\.\., classes\)"),
        (lambda x, y: nn.softmax_cross_entropy(x, y[:2]), ValueError, r"of shape \(3,\)"),
        (lambda x, y: nn.softmax_cross_entropy(x, x[:, :2]), ValueError, "probabilities of shape"),
        (lambda x, y: nn.softmax_cross_entropy(x, y > 0), ValueError, "got bool"),
        (
            lambda x, y: nn.softmax_cross_entropy(x, y, label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be from 0 to 1, got 1\.5",
        ),
        (
            lambda x, y: nn.softmax_cross_entropy(x, y, class_weights=[1.0]),
            ValueError,
            r"class_weights must have shape \(4,\), got \(1,\)",
        ),
        (
            lambda x, y: nn.softmax_cross_entropy(x, x, ignore_label=1),
            ValueError,
            "ignore_label goes with integer labels",
        ),
        (
            lambda x, y: nn.softmax_cross_entropy(x, y, reduction="average"),
            ValueError,
            "reduction must be 'mean', 'sum' or 'none', got 'average'",
        ),
        (
            lambda x, y: nn.sigmoid_cross_entropy(x, y),
            ValueError,
            r"\[sigmoid_cross_entropy\] logits and targets must have one shape",
        ),
    ],
)  # fmt: skip
def test_what_cross_entropies_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call(logits_of(3, 4), labels_of(3, 4))


# ---- the classes


LOSSES = {
    "mse": (losses.MeanSquaredError, T, P, lambda: ((T - P) ** 2).mean(-1)),
    "mae": (losses.MeanAbsoluteError, T, P, lambda: np.abs(T - P).mean(-1)),
    "huber": (losses.Huber, T, P, lambda: special.huber(1.0, T - P).mean(-1)),
    "sparse": (
        losses.SparseCategoricalCrossentropy,
        labels_of(6, 5),
        probabilities_of(6, 5),
        lambda: -np.log(probabilities_of(6, 5)[np.arange(6), labels_of(6, 5)]),
    ),
    "categorical": (
        losses.CategoricalCrossentropy,
        probabilities_of(6, 5),
        probabilities_of(6, 5, seed=4),
        lambda: -(probabilities_of(6, 5) * np.log(probabilities_of(6, 5, seed=4))).sum(-1),
    ),
    "binary": (
        losses.BinaryCrossentropy,
        (T > 0).astype(float),
        special.expit(P),
        lambda: -np.where(T > 0, special.log_expit(P), special.log_expit(-P)).mean(-1),
    ),
    "kl": (
        losses.KLDivergence,
        probabilities_of(6, 5),
        probabilities_of(6, 5, seed=4),
        lambda: special.rel_entr(probabilities_of(6, 5), probabilities_of(6, 5, seed=4)).sum(-1),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_and_sample_weights(name):
    kind, t, p, plain = LOSSES[name]
    each, weights = plain(), np.array([0.0, 1.0, 2.0, 0.5, 3.0, 1.5])
    close(kind()(t, p), each.mean(), rtol=1e-10)
    close(kind(reduction="sum")(t, p), each.sum(), rtol=1e-10)
    close(kind(reduction="none")(t, p), each, rtol=1e-10)
    close(kind()(t, p, weights), (weights * each).sum() / 6, rtol=1e-10)  # by 6: Keras's mean
    close(kind(reduction="sum")(t, p, weights), (weights * each).sum(), rtol=1e-10)
    close(kind(reduction="none")(t, p, weights), weights * each, rtol=1e-10)
    close(kind()(t, p, 2.0), 2 * each.mean(), rtol=1e-10)
    for wrong in (weights[:5], weights[:, None], np.ones((1, 6))):
        with pytest.raises(ValueError, match=r"sample_weight must have shape \(6,\), got"):
            kind()(t, p, wrong)


def test_options_of_the_classes():
    x, t, y = logits_of(6, 5), probabilities_of(6, 5), labels_of(6, 5)
    log_p = special.log_softmax(x, -1)
    close(losses.Huber(delta=0.5)(T, P), special.huber(0.5, T - P).mean())
    close(losses.SparseCategoricalCrossentropy(from_logits=True)(y, x), -log_p[range(6), y].mean())
    smooth = 0.9 * t + 0.02
    loss = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    close(loss(t, x), -(smooth * log_p).sum(-1).mean())
    loss = losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1)
    smooth = 0.9 * t + 0.05
    each = -(smooth * special.log_expit(x) + (1 - smooth) * special.log_expit(-x))
    close(loss(t, x), each.mean())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mse", losses.MeanSquaredError),
        ("mean_squared_error", losses.MeanSquaredError),
        ("mae", losses.MeanAbsoluteError),
        ("mean_absolute_error", losses.MeanAbsoluteError),
        ("huber", losses.Huber),
        ("sparse_categorical_crossentropy", losses.SparseCategoricalCrossentropy),
        ("categorical_crossentropy", losses.CategoricalCrossentropy),
        ("binary_crossentropy", losses.BinaryCrossentropy),
        ("kl_divergence", losses.KLDivergence),
    ],
)
def test_losses_by_name(name, kind):
    assert type(losses.get(name)) is kind


def test_losses_by_function_and_by_object():
    def twice_the_error(t, p):
        return 2.0 * tg.mean(tg.abs(t - p), axis=-1)

    found = losses.get(twice_the_error)
    assert found.name == "twice_the_error"
    close(found(T, P), 2 * np.abs(T - P).mean())
    given = losses.Huber()
    assert losses.get(given) is given
    for wrong in ("mes", 3, None, losses.Huber):
        with pytest.raises(
            ValueError, match=r"loss must be a function, a Loss or one of mse, .* got"
        ):
            losses.get(wrong)
    with pytest.raises(
        ValueError, match="reduction must be 'sum_over_batch_size', 'sum' or 'none'"
    ):
        losses.MeanSquaredError(reduction="mean")


def test_what_a_loss_shows():
    assert repr(losses.get("mae")) == (
        "<MeanAbsoluteError mean_absolute_error reduction='sum_over_batch_size'>"
    )


# ---- metrics

SCORES = np.random.default_rng(8).normal(size=(40, 5))
LABELS = np.random.default_rng(9).integers(0, 5, 40)
WEIGHTS = np.random.default_rng(10).uniform(0.0, 2.0, 40)
SIGNS = (np.random.default_rng(11).normal(size=40) > 0).astype(np.float64)
CHANCES = np.random.default_rng(12).uniform(size=40)


def top_k_hits(k):
    return [label in sorted(range(5), key=lambda c: -row[c])[:k]
            for row, label in zip(SCORES, LABELS, strict=True)]  # fmt: skip


METRICS = {
    "accuracy of labels": (metrics.Accuracy, LABELS, SCORES, lambda: SCORES.argmax(1) == LABELS),
    "accuracy of targets": (
        metrics.Accuracy,
        np.eye(5)[LABELS],
        SCORES,
        lambda: SCORES.argmax(1) == LABELS,
    ),
    "accuracy of one class": (metrics.Accuracy, SIGNS, CHANCES, lambda: (CHANCES > 0.5) == SIGNS),
    "sparse": (
        metrics.SparseCategoricalAccuracy,
        LABELS[:, None],
        SCORES,
        lambda: SCORES.argmax(1) == LABELS,
    ),
    "categorical": (
        metrics.CategoricalAccuracy,
        np.eye(5)[LABELS],
        SCORES,
        lambda: SCORES.argmax(1) == LABELS,
    ),
    "binary": (metrics.BinaryAccuracy, SIGNS, CHANCES, lambda: (CHANCES > 0.5) == SIGNS),
    "binary of logits": (
        lambda: metrics.BinaryAccuracy(threshold=0.0),
        SIGNS,
        CHANCES - 0.5,
        lambda: (CHANCES > 0.5) == SIGNS,
    ),
    "top 1": (lambda: metrics.TopKAccuracy(k=1), LABELS, SCORES, lambda: top_k_hits(1)),
    "top 3": (lambda: metrics.TopKAccuracy(k=3), LABELS, SCORES, lambda: top_k_hits(3)),
    "mse": (
        metrics.MeanSquaredError,
        np.eye(5)[LABELS],
        SCORES,
        lambda: ((np.eye(5)[LABELS] - SCORES) ** 2).mean(-1),
    ),
    "mae": (
        metrics.MeanAbsoluteError,
        np.eye(5)[LABELS],
        SCORES,
        lambda: np.abs(np.eye(5)[LABELS] - SCORES).mean(-1),
    ),
    "function": (
        lambda: metrics.Metric(lambda t, p: tg.max(p, axis=-1)),
        LABELS,
        SCORES,
        lambda: SCORES.max(-1),
    ),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_metrics_over_unequal_batches_are_those_of_the_whole(name, weighted):
    make, t, p, plain = METRICS[name]
    each, weights = np.asarray(plain(), float), WEIGHTS if weighted else np.ones(40)
    assert each.mean() > 0
    assert each.std() > 0  # so that a mean of the batches' means would differ
    metric = make()
    cuts = [0, 1, 8, 8, 29, 40]
    for start, end in itertools.pairwise(cuts):
        part = slice(start, end)
        metric.update_state(t[part], p[part], weights[part] if weighted else None)
    expected = (each * weights).sum() / weights.sum()
    assert metric.result().dtype == np.float64
    assert float(metric.result()) == pytest.approx(expected, rel=1e-12)
    metric.reset_state()
    metric.update_state(t[:7], p[:7])
    assert float(metric.result()) == pytest.approx(each[:7].mean(), rel=1e-12)


def test_counting_is_exact_beyond_float32():
    # 2**24 + 1 is no float32: a float32 count would stand still there.
    mean = metrics.Mean()
    mean.update_state(np.ones(1, np.float32), 2.0**24)
    for _ in range(4):
        mean.update_state(np.zeros(1, np.float32))
    assert float(mean.result()) == 2.0**24 / (2.0**24 + 4)


def test_the_mean():
    mean = metrics.Mean("average")
    assert float(mean.result()) == 0.0
    mean.update_state([[1.0, 2.0], [3.0, 6.0]])
    assert float(mean.result()) == 3.0
    mean.update_state(8.0, 4.0)
    assert float(mean.result()) == (12.0 + 32.0) / 8
    mean.update_state([1.0, 3.0], 0.0)
    assert float(mean.result()) == 44.0 / 8
    mean.update_state([[1.0, 3.0], [5.0, 7.0]], [[0.0, 2.0], [0.0, 0.0]])
    assert float(mean.result()) == (44.0 + 6.0) / (8 + 2)
    assert repr(mean) == "<Mean average=5>"
    mean.reset_state()
    assert float(mean.result()) == 0.0
    with pytest.raises(
        ValueError, match=r"\[average\] sample_weight must have shape \(2,\), got \(3,\)"
    ):
        mean.update_state([1.0, 2.0], [1.0, 2.0, 3.0])


def test_metrics_of_nothing_but_zero_weights():
    mean = metrics.Mean()
    mean.update_state([5.0, 7.0], [0.0, 0.0])
    assert float(mean.result()) == 0.0


def test_metrics_are_not_recorded():
    v = tg.Variable(SCORES)
    with tg.GradientTape() as tape:
        metric = metrics.MeanSquaredError()
        metric.update_state(np.eye(5)[LABELS], v)
        result = metric.result() * 1.0
    assert tape.gradient(result, v) is None
    assert tape.watched_variables() == ()


def test_binary_accuracy_at_the_threshold():
    found = metrics.binary_accuracy([1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.6, 0.4])
    np.testing.assert_array_equal(found, [0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(metrics.binary_accuracy([[1], [0]], [0.9, 0.8]), [1.0, 0.0])


def test_the_accuracy_that_fits_the_shapes():
    close(metrics.accuracy([1, 0], [[0.1, 0.9], [0.2, 0.8]]), [1.0, 0.0])
    close(metrics.accuracy([[1], [0]], [[0.1, 0.9], [0.2, 0.8]]), [1.0, 0.0])
    close(metrics.accuracy([[0, 1], [1, 0]], [[0.1, 0.9], [0.2, 0.8]]), [1.0, 0.0])
    close(metrics.accuracy([1, 0], [[0.9], [0.8]]), [[1.0], [0.0]])
    deep = np.random.default_rng(1).normal(size=(2, 3, 4))
    close(metrics.accuracy(deep.argmax(-1), deep), np.ones((2, 3)))


@pytest.mark.parametrize(
    ("function", "t", "p", "message"),
    [
        (metrics.sparse_categorical_accuracy, [0, 1, 2], np.ones((2, 3)), r"\(2,\), got \(3,\)"),
        (metrics.sparse_categorical_accuracy, [[0, 1]], np.ones((2, 3)), r"have shape \(2,\)"),
        (
            metrics.categorical_accuracy,
            np.ones((3, 2)),
            np.ones((2, 2)),
            r"one shape, got \(3, 2\)",
        ),
        (
            metrics.categorical_accuracy,
            np.ones((2, 3)),
            np.ones((2, 2)),
            r"one shape, got \(2, 3\)",
        ),
        (metrics.binary_accuracy, np.ones(3), np.ones(2), r"one shape, got \(3,\) and \(2,\)"),
        (metrics.top_k_accuracy, [0, 1], np.ones((2, 3)), r"k\b.*\b5"),  # of three classes
    ],
)
def test_what_metrics_refuse(function, t, p, message):
    with pytest.raises(ValueError, match=message):
        function(t, p)


@pytest.mark.parametrize("labels", [[[0], [1]], [0], [[0, 1]], [0, 1, 2]])
def test_top_k_accuracy_never_broadcasts_labels(labels):
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    if labels == [[0], [1]]:  # (n, 1) is taken for (n,), as by the sparse accuracy
        close(metrics.top_k_accuracy(labels, scores, k=1), [1.0, 0.0])
    else:
        with pytest.raises(ValueError, match="shape"):
            metrics.top_k_accuracy(labels, scores, k=1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("accuracy", metrics.Accuracy),
        ("acc", metrics.Accuracy),
        ("sparse_categorical_accuracy", metrics.SparseCategoricalAccuracy),
        ("categorical_accuracy", metrics.CategoricalAccuracy),
        ("binary_accuracy", metrics.BinaryAccuracy),
        ("top_k_accuracy", metrics.TopKAccuracy),
        ("mse", metrics.MeanSquaredError),
        ("mean_squared_error", metrics.MeanSquaredError),
        ("mae", metrics.MeanAbsoluteError),
        ("mean_absolute_error", metrics.MeanAbsoluteError),
    ],
)
def test_metrics_by_name(name, kind):
    assert type(metrics.get(name)) is kind
    assert metrics.get(name) is not metrics.get(name)


def test_metrics_by_function_and_by_object():
    def largest(t, p):
        return tg.max(p, axis=-1)

    assert metrics.get(largest).name == "largest"
    given = metrics.Accuracy("hits")
    assert metrics.get(given) is given
    assert repr(given) == "<Accuracy hits=0>"
    for wrong in ("accurcy", 3, metrics.Accuracy):
        with pytest.raises(
            ValueError, match="metric must be a function, a metric or one of accuracy"
        ):
            metrics.get(wrong)
