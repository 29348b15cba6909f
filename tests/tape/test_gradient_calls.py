"""What `gradient` is asked and what it answers (rows G, U and O)."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter, OrderedDict, defaultdict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest

import tapegrad as tg
from tapegrad._recording import user_location
from tapegrad.primitive import Primitive

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Layer:
    kernel: tg.Variable
    bias: tg.Variable


def recorded(function, *xs, persistent=False):
    """Return a tape and what `function` made of `xs` on it."""
    with tg.GradientTape(persistent) as tape:
        y = function(*xs)
    return tape, y


def second_derivative(function, x, **options):
    """Return the derivative of the gradient of `function` at x."""
    with tg.GradientTape() as outer:
        outer.watch(x)
        with tg.GradientTape() as inner:
            inner.watch(x)
            y = function(x)
        slope = inner.gradient(y, x)
    return outer.gradient(slope, x, **options)


# ---- target and sources


def test_G1_the_answer_has_the_structure_of_the_sources():
    x, w = tg.Variable(3.0), tg.Variable(5.0)  # z = x^2 w: dz/dx = 30, dz/dw = 9
    tape, z = recorded(lambda: x * x * w, persistent=True)

    def ask(sources):
        return tape.gradient(z, sources)

    assert float(ask(x)) == 30.0
    assert ask([x, w]) == [30.0, 9.0]
    assert type(ask((w, x))) is tuple
    assert ask((w, x)) == (9.0, 30.0)
    assert isinstance(ask(Pair(x, w)), Pair)
    assert ask(Pair(x, w)).second == 9.0
    for kind in (dict, OrderedDict):
        answer = ask(kind(z=x, a=w))  # not sorted: matched by key, order kept
        assert type(answer) is kind
        assert list(answer.items()) == [("z", 30.0), ("a", 9.0)]
    answer = ask(defaultdict(list, b=w))
    assert type(answer) is defaultdict
    assert answer.default_factory is list
    assert answer["b"] == 9.0
    answer = ask(Layer(kernel=x, bias=w))
    assert isinstance(answer, Layer)
    assert (answer.kernel, answer.bias) == (30.0, 9.0)
    assert ask([x, {"k": (w, [x])}]) == [30.0, {"k": (9.0, [30.0])}]


@dataclasses.dataclass(frozen=True)
class Doubling:
    kernel: tg.Variable
    twice: tuple = dataclasses.field(init=False)
    scale: dataclasses.InitVar[float]

    def __post_init__(self, scale):
        object.__setattr__(self, "kernel", self.kernel * scale)
        object.__setattr__(self, "twice", (self.kernel, self.kernel))


class Named(list):
    def __init__(self, name, leaves):
        super().__init__(leaves)
        self.name = name


def test_G1_containers_are_not_initialised_anew():
    tape = tg.GradientTape(persistent=True)
    with tape:
        x = tg.constant(3.0)
        tape.watch(x)
        sources = Doubling(x, 2.0)
        named, counted = Named("n", [x]), Counter(a=x)
        z = sources.kernel * x
    answer = tape.gradient(z, sources)
    assert type(answer) is Doubling
    assert (answer.kernel, answer.twice) == (3.0, (3.0, 3.0))
    answer = tape.gradient(z, named)
    assert (type(answer), answer.name, list(answer)) == (Named, "n", [12.0])
    assert dict(tape.gradient(z, counted)) == {"a": 12.0}
    answer = tape.gradient(z, MappingProxyType({"a": x}))
    assert type(answer) is MappingProxyType
    assert answer == {"a": 12.0}


@pytest.mark.parametrize("nothing", [[], (), {}])
def test_G1_no_sources_give_no_gradients(nothing):
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x)
    answer = tape.gradient(y, nothing)
    assert answer == nothing
    assert type(answer) is type(nothing)


def test_G2_values_of_a_dict_give_a_list():
    x, w = tg.Variable(3.0), tg.Variable(5.0)
    tape, z = recorded(lambda: x * x * w)
    answer = tape.gradient(z, {"z": x, "a": w}.values())
    assert type(answer) is list
    assert answer == [30.0, 9.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: {x}, r"sources .*got a set; wrap it in list\("),
        (lambda x: (v for v in [x]), r"sources .*got a generator; wrap it in list\("),
        (lambda x: {"a": x}.keys(), r"sources .*wrap it in list\("),
        (lambda x: "x", "sources is a str"),
        (lambda x: None, "sources is None"),
    ],
)
def test_G3_sources_that_are_no_structure(make, words):
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x)
    with pytest.raises(TypeError, match=words):
        tape.gradient(y, make(x))


def test_G4_a_none_among_the_sources_is_named():
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x)
    with pytest.raises(TypeError, match=r"sources\[1\] is None"):
        tape.gradient(y, [x, None])
    with pytest.raises(TypeError, match=r"sources\['dense'\]\[1\] is None"):
        tape.gradient(y, {"dense": (x, None)})


@pytest.mark.parametrize("source", [np.ones(2), 3.0, 3, np.float32(3.0)])
def test_G5_an_array_or_number_as_a_source(source):
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x)
    with pytest.raises(TypeError, match=rf"sources is .*{type(source).__name__}.*tg\.constant"):
        tape.gradient(y, source)


def test_G6_duplicate_sources_each_get_the_whole_gradient():
    x = tg.Variable([3.0, 4.0])
    tape, y = recorded(lambda: x * x)
    first, second = tape.gradient(y, [x, x])
    mine = first.numpy()
    mine[...] = 99.0
    np.testing.assert_array_equal(second, [6.0, 8.0])
    np.testing.assert_array_equal(first, [6.0, 8.0])


@pytest.mark.parametrize("target", [None, [None], {"loss": None}])
def test_G7_a_target_of_none(target):
    x = tg.Variable(3.0)
    tape, _ = recorded(lambda: x * x)
    with pytest.raises(TypeError, match=r"None.*did your loss function forget to return"):
        tape.gradient(target, x)


@pytest.mark.parametrize("target", [9.0, np.float32(9.0), np.ones(2), 9])
def test_G8_a_target_that_has_left(target):
    x = tg.Variable(3.0)
    tape, _ = recorded(lambda: x * x)
    with pytest.raises(TypeError, match=rf"{type(target).__name__}.*left tapegrad.*\.numpy\(\)"):
        tape.gradient(target, x)


def test_G9_a_structure_of_targets_is_summed():
    x = tg.Variable(3.0)
    tape, (y, z) = recorded(lambda: (x * x, x * x * x), persistent=True)
    for target in ([y, z], (y, z), {"b": y, "a": z}, [y, {"k": (z,)}]):
        assert float(tape.gradient(target, x)) == 33.0  # 2 x + 3 x^2
    assert tape.gradient([], x) is None
    assert float(tape.gradient([], x, unconnected_gradients="zero")) == 0.0


def test_G10_a_target_that_is_no_scalar_is_summed():
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x * tg.constant([[1.0, 4.0], [6.0, 0.0]]))
    assert float(tape.gradient(y, x)) == 66.0


@pytest.fixture
def scalar_targets():
    """Change the setting for a test, and set it back."""
    before = tg.config.scalar_targets
    yield lambda choice: setattr(tg.config, "scalar_targets", choice)
    tg.config.scalar_targets = before


def test_G10_unless_the_settings_are_strict(scalar_targets):
    x = tg.Variable([3.0, 4.0])
    tape, y = recorded(lambda: x * x, persistent=True)
    scalar_targets("warn")
    with pytest.warns(tg.TapeWarning, match=r"shape \(2,\).*jacobian") as caught:
        np.testing.assert_array_equal(tape.gradient(y, x), [6.0, 8.0])
    assert caught[0].filename == __file__
    scalar_targets("raise")
    with pytest.raises(ValueError, match=r"shape \(2,\).*jacobian"):
        tape.gradient(y, x)
    # With weights, and for scalars, there is nothing to be surprised by.
    np.testing.assert_array_equal(tape.gradient(y, x, [1.0, 1.0]), [6.0, 8.0])
    tape, y = recorded(lambda: tg.sum(x * x))
    np.testing.assert_array_equal(tape.gradient(y, x), [6.0, 8.0])


def test_G11_the_same_target_twice_counts_twice():
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x)
    assert float(tape.gradient([y, y], x)) == 12.0


@pytest.mark.parametrize("read", [False, True])
def test_G12_a_variable_as_target(read):
    x, w = tg.Variable([3.0, 4.0]), tg.Variable(5.0)
    tape, _ = recorded(lambda: read and x * w)
    dx, dw = tape.gradient(x, [x, w])
    np.testing.assert_array_equal(dx, [1.0, 1.0])
    assert dw is None


def test_G13_a_target_that_is_a_source_gets_its_seed():
    x = tg.Variable(2.0)
    tape, y = recorded(lambda: x * x)
    assert float(tape.gradient([x, y], x)) == 5.0
    tape, _ = recorded(lambda: None)
    never_watched = tg.constant([2.0, 3.0])
    np.testing.assert_array_equal(tape.gradient(never_watched, never_watched), [1.0, 1.0])


def test_G14_targets_that_feed_each_other():
    x = tg.Variable(2.0)
    tape, (m, z) = recorded(lambda: (lambda m: (m, m * m))(x * x))
    # z = m^2, m = x^2 = 4: 1 + 2 m = 9, and 9 * 2 x = 36
    assert tape.gradient([m, z], [m, x]) == [9.0, 36.0]


def test_G15_an_intermediate_as_source_needs_no_watch():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        z = y * y
    assert tape.gradient(z, [x, y]) == [108.0, 18.0]


def test_G15_paths_around_and_through_an_intermediate():
    x = tg.Variable(3.0)
    with tg.GradientTape() as tape:
        y = x * x
        z = y * x + y
    assert tape.gradient(z, [y, x]) == [4.0, 33.0]  # x + 1; 3 x^2 + 2 x


def test_G16_an_operand_that_is_not_watched():
    c, x = tg.constant(3.0), tg.Variable(2.0)
    tape, y = recorded(lambda: c * x + c * c)
    dc, dx = tape.gradient(y, [c, x])
    assert dc is None
    assert float(dx) == 3.0


def test_G17_targets_computed_elsewhere():
    x = tg.Variable(3.0)
    before = x * x
    with tg.GradientTape(persistent=True) as tape, tape.stop_recording():
        paused = x * x
    after = x * x
    for target in (before, paused, after):
        assert tape.gradient(target, x) is None


def test_G18_a_target_that_began_before_the_block():
    x = tg.Variable(3.0)
    y = x * x
    tape, z = recorded(lambda: y * x)
    assert float(tape.gradient(z, x)) == 9.0


@pytest.mark.parametrize("value", [3, True])
def test_G19_targets_that_are_not_floating(value):
    n, x = tg.constant(value), tg.Variable(3.0)
    tape, y = recorded(lambda: tg.astype(x, "int64"), persistent=True)
    assert tape.gradient(y, x) is None
    assert tape.gradient(n, x) is None
    assert tape.gradient(n, n) is None
    assert tape.gradient(y, y) is None
    assert float(tape.gradient([y, x * 2.0, x], x)) == 1.0  # only x itself counts


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 1), (2, 3), (1, 1), (4, 2, 3)])
def test_G20_a_gradient_has_its_sources_shape_and_dtype(shape, dtype):
    x = tg.Variable(np.ones(shape), dtype=dtype)
    other = tg.constant(np.full((2, 3), 2.0))
    tape, y = recorded(lambda: x * other)
    dx = tape.gradient(y, x)
    assert (dx.shape, dx.dtype) == (shape, np.dtype(dtype))
    spread = np.broadcast_shapes(shape, (2, 3))
    each = 2.0 * np.prod(spread) / np.prod(shape)  # every element is used so many times, times 2
    np.testing.assert_array_equal(dx, np.full(shape, each))


def test_G20_when_both_operands_are_watched():
    x, w = tg.Variable([3.0, 4.0], dtype="float32"), tg.Variable([2.0, 5.0], dtype="float64")
    tape, y = recorded(lambda: x * w)
    dx, dw = tape.gradient(y, [x, w])
    assert (y.dtype, dx.dtype, dw.dtype) == ("float64", "float32", "float64")
    np.testing.assert_array_equal(dx, [2.0, 5.0])
    np.testing.assert_array_equal(dw, [3.0, 4.0])


def test_G20_through_casts_too():
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: tg.astype(x, "float64") ** 2)
    dx = tape.gradient(y, x)
    assert y.dtype == "float64"
    assert (dx.dtype, float(dx)) == ("float32", 6.0)


def test_G20_of_an_empty_product_of_broadcasting():
    x = tg.Variable([[2.0]])
    empty = tg.Variable(np.zeros(0, np.float32))
    tape, y = recorded(lambda: x * empty)
    dx, dempty = tape.gradient(y, [x, empty])
    assert y.shape == (1, 0)
    np.testing.assert_array_equal(dx, [[0.0]])
    assert dempty.shape == (0,)


def test_G20_seeds_and_seed_only_gradients_too():
    x = tg.Variable(np.ones((2, 1)), dtype="float16")
    tape, _ = recorded(lambda: None)
    dx = tape.gradient(x, x)
    assert (dx.shape, dx.dtype) == ((2, 1), np.dtype("float16"))


def test_G21_gradients_cannot_be_changed():
    x, weights = tg.Variable([1.0, 2.0]), tg.constant([5.0, 6.0])
    tape, y = recorded(lambda: x + 0.0)
    dx = tape.gradient(y, x, weights)
    with pytest.raises(TypeError):
        dx[0] = 9.0
    out = dx.numpy()
    out[...] = 99.0
    for shared in (dx.array, np.asarray(dx)):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 99.0
    np.testing.assert_array_equal(dx, [5.0, 6.0])
    np.testing.assert_array_equal(weights, [5.0, 6.0])


def test_G22_a_gathered_source_has_a_dense_gradient():
    x = tg.Variable([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    tape, y = recorded(lambda: tg.gather(x, [0, 0, 2]))
    dx = tape.gradient(y, x)
    assert isinstance(dx, tg.Tensor)
    np.testing.assert_array_equal(dx, [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]])


def test_G23_all_arguments_by_keyword_and_by_position():
    x, unused = tg.Variable(3.0), tg.Variable(1.0)
    tape, y = recorded(lambda: x * x, persistent=True)
    by_keyword = tape.gradient(
        target=y, sources=[x, unused], output_gradients=2.0, unconnected_gradients="zero"
    )
    assert by_keyword == [12.0, 0.0]
    assert tape.gradient(y, [x, unused], 2.0, "zero") == [12.0, 0.0]


# ---- unconnected sources


def test_U1_none_by_default():
    x, unused = tg.Variable(3.0), tg.Variable(1.0)
    tape, y = recorded(lambda: x * x)
    assert tape.gradient(y, unused) is None


@pytest.mark.parametrize("zero", ["zero", tg.UnconnectedGradients.ZERO])
def test_U2_zeros_of_the_sources_shape_and_dtype(zero):
    x = tg.Variable(3.0)
    sources = [
        tg.Variable(np.ones((2, 3)), dtype="float16"),
        tg.Variable(np.ones(0)),
        tg.Variable(7),
        tg.constant(True),
    ]
    tape, y = recorded(lambda: x * x)
    answers = tape.gradient(y, sources, unconnected_gradients=zero)
    for answer, source in zip(answers, sources, strict=True):
        assert (answer.shape, answer.dtype) == (source.shape, source.dtype)
        assert not np.any(answer.numpy())


def test_U2_the_enum_is_one_of_strings():
    assert issubclass(tg.UnconnectedGradients, enum.StrEnum)
    assert tg.UnconnectedGradients.NONE == "none"
    assert tg.UnconnectedGradients.ZERO == "zero"


@pytest.mark.parametrize("value", ["nonsense", "ZERO", "None", None, 0, []])
def test_U3_unknown_values(value):
    x = tg.Variable(3.0)
    tape, y = recorded(lambda: x * x, persistent=True)
    for call in (tape.gradient, tape.jacobian):
        with pytest.raises(ValueError, match="Unknown value for unconnected_gradients") as caught:
            call(y, x, unconnected_gradients=value)
        assert repr(value) in str(caught.value)


LINEAR = {
    "2x": lambda x: 2.0 * x,
    "x+x": lambda x: x + x,
    "sum": tg.sum,
    "mean": tg.mean,
    "max": tg.max,
    "-x": lambda x: -x,
    "x/2": lambda x: x / 2.0,
    "reshape": lambda x: tg.reshape(x, (1, 2)),
    "x[0]": lambda x: x[0],
}


@pytest.mark.parametrize("name", LINEAR)
def test_U4_the_second_derivative_of_something_linear(name):
    x = tg.Variable([1.0, 2.0])
    assert second_derivative(LINEAR[name], x) is None
    zero = second_derivative(LINEAR[name], x, unconnected_gradients="zero")
    np.testing.assert_array_equal(zero, [0.0, 0.0])


def test_U5_abs_twice_is_zero():
    """Documented: the sign is an operation with the derivative 0, so the answer is 0, not None."""
    np.testing.assert_array_equal(second_derivative(tg.abs, tg.Variable([-1.0, 0.0, 2.0])), [0] * 3)


def test_U5_relu_twice():
    """Documented: 0, whether as zeros or as None with "zero"."""
    x = tg.Variable([-1.0, 0.0, 2.0])
    answer = second_derivative(tg.nn.relu, x, unconnected_gradients="zero")
    np.testing.assert_array_equal(answer, [0.0, 0.0, 0.0])


CONSTANT = {
    "floor": tg.floor,
    "round": tg.round,
    "ceil": tg.ceil,
    "trunc": tg.trunc,
    "//": lambda x: x // 2.0,
    "argmax": tg.argmax,
    "argsort": tg.argsort,
    "<": lambda x: x < 2.0,
    "==": lambda x: x == 2.0,
    "isnan": tg.isnan,
}


@pytest.mark.parametrize("name", CONSTANT)
def test_U6_piecewise_constant_operations(name):
    """Documented: None as in TensorFlow (0 on request), also where float goes to float."""
    x = tg.Variable([1.3, 2.6])
    tape, y = recorded(CONSTANT[name], x, persistent=True)
    assert tape.gradient(y, x) is None
    zero = tape.gradient(y, x, unconnected_gradients="zero")
    np.testing.assert_array_equal(zero, [0.0, 0.0])


def test_U6_sign_has_the_derivative_zero():
    x = tg.Variable([-2.0, 0.0, 3.0])
    tape, y = recorded(tg.sign, x)
    np.testing.assert_array_equal(tape.gradient(y, x), [0.0, 0.0, 0.0])


def test_U7_an_operation_without_a_rule():
    forgotten = Primitive("forgotten", lambda xp, x: x * 1)
    x, w = tg.Variable(3.0), tg.Variable(2.0)
    with tg.GradientTape(persistent=True) as tape:
        y, where = forgotten(x), user_location()
        z = y * w
    with pytest.raises(LookupError, match="forgotten") as caught:
        tape.gradient(z, x)
    assert where in str(caught.value)
    assert float(tape.gradient(z, w)) == 3.0  # where it is not needed it does not matter


def test_U8_raise_explains():
    used, unused = tg.Variable(3.0), tg.Variable(1.0, name="unused")
    fixed, count = tg.Variable(1.0, trainable=False, name="fixed"), tg.Variable(1, name="count")
    c = tg.constant(1.0)
    with tg.GradientTape(persistent=True) as tape:
        y = used * fixed * count * c
    for source, words in [
        (unused, "unused.*not read"),
        (fixed, "fixed.*not trainable"),
        (count, "int64"),
        (c, "not watch"),
    ]:
        with pytest.raises(ValueError, match=rf"sources\['w'\]\[1\].*{words}"):
            tape.gradient(y, {"w": [used, source]}, unconnected_gradients="raise")
    assert float(tape.gradient(y, used, unconnected_gradients="raise")) == 1.0


def test_U9_variables_and_zero():
    sources = {"w": tg.Variable([[1.0, 2.0]], name="w"), "b": tg.Variable([3.0], name="b")}
    x = tg.Variable(2.0)
    tape, y = recorded(lambda: x * x)
    answer = tape.gradient(y, sources, unconnected_gradients="zero")
    np.testing.assert_array_equal(answer["w"], [[0.0, 0.0]])
    np.testing.assert_array_equal(answer["b"], [0.0])


# ---- output_gradients


def test_O1_weights_of_the_targets_elements():
    x = tg.Variable([1.0, 2.0])
    tape, y = recorded(lambda: x * x, persistent=True)
    for weights in (tg.constant([10.0, 100.0]), tg.Variable([10.0, 100.0])):
        np.testing.assert_array_equal(tape.gradient(y, x, weights), [20.0, 400.0])


def test_O2_a_list_of_weights_for_a_list_of_targets():
    x = tg.Variable(3.0)
    tape, targets = recorded(lambda: [x * x, x * x * x])
    assert float(tape.gradient(targets, x, [tg.constant(10.0), tg.constant(100.0)])) == 2760.0


def test_O3_dicts_are_matched_by_key():
    x = tg.Variable(3.0)
    tape, targets = recorded(lambda: {"b": x * x, "a": x * x * x})
    assert float(tape.gradient(targets, x, {"a": 100.0, "b": 10.0})) == 2760.0


@pytest.mark.parametrize("weights", [[10.0, 100.0], {"a": 1.0, "c": 2.0}, {"a": 1.0}, 1.0])
def test_O4_another_structure_is_refused(weights):
    x = tg.Variable(3.0)
    tape, targets = recorded(lambda: {"b": x * x, "a": x * x * x})
    with pytest.raises(ValueError, match="output_gradients must have the structure of target"):
        tape.gradient(targets, x, weights)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_O5_arrays_are_cast_to_the_targets_dtype(dtype):
    x = tg.Variable([1.0, 2.0])
    tape, y = recorded(lambda: x * x)
    dx = tape.gradient(y, x, np.array([10, 100], dtype))
    assert dx.dtype == "float32"
    np.testing.assert_array_equal(dx, [20.0, 400.0])


def test_O5_a_source_that_is_the_target_gets_them_cast():
    x = tg.Variable([1.0, 2.0])
    tape, _ = recorded(lambda: None)
    dx = tape.gradient(x, x, np.array([10.0, 100.0]))
    assert dx.dtype == "float32"
    np.testing.assert_array_equal(dx, [10.0, 100.0])


def test_O6_a_flat_list_for_one_tensor_is_an_array():
    x = tg.Variable([1.0, 2.0])
    tape, y = recorded(lambda: x * x)
    np.testing.assert_array_equal(tape.gradient(y, x, [10.0, 100.0]), [20.0, 400.0])


@pytest.mark.parametrize("function", [lambda x: x + 1.0, lambda x: x * x, tg.exp])
@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0], 1.0, [[1.0, 2.0]], [1.0]])
def test_O7_a_wrong_shape_is_refused_before_anything_runs(function, weights):
    x = tg.Variable([1.0, 2.0])
    tape, y = recorded(function, x)
    with pytest.raises(ValueError, match="output_gradients") as caught:
        tape.gradient(y, x, tg.constant(weights))
    assert str(np.shape(weights)) in str(caught.value)
    assert "(2,)" in str(caught.value)
    tape.gradient(y, x)  # the tape is not spent


@pytest.mark.parametrize("count", [0, 1, 3])
def test_O8_a_wrong_number_is_refused(count):
    x = tg.Variable(3.0)
    tape, targets = recorded(lambda: [x * x, x * x * x])
    with pytest.raises(ValueError, match=rf"2.*{count}"):
        tape.gradient(targets, x, [1.0] * count)


def test_O9_none_stands_for_ones():
    x = tg.Variable([3.0, 4.0])
    tape, targets = recorded(lambda: [x * x, x * x * x])
    dx = tape.gradient(targets, x, [None, [10.0, 100.0]])
    np.testing.assert_array_equal(dx, [6.0 + 270.0, 8.0 + 4800.0])


def test_O10_the_weight_of_a_target_that_is_a_source():
    x = tg.Variable(3.0)
    tape, loss = recorded(lambda: x * x)
    assert float(tape.gradient([loss, x], x, [1.0, 2.0])) == 8.0


def test_O11_integer_weights_are_cast():
    x = tg.Variable([1.0, 2.0])
    tape, y = recorded(lambda: x * x, persistent=True)
    for weights in (tg.constant([10, 100]), [10, 100]):
        dx = tape.gradient(y, x, weights)
        assert dx.dtype == "float32"
        np.testing.assert_array_equal(dx, [20.0, 400.0])


def test_O12_the_weights_are_differentiable():
    x, w = tg.Variable(2.0), tg.Variable(5.0)
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = x * x * x
        dx = inner.gradient(y, x, w)
    dxx, dxw = outer.gradient(dx, [x, w])
    # w 3 x^2, w 6 x, 3 x^2
    assert [float(g) for g in (dx, dxx, dxw)] == [60.0, 60.0, 12.0]


def test_O12_also_when_they_are_cast():
    x, w = tg.Variable(2.0), tg.Variable(np.float64(5.0))
    with tg.GradientTape() as outer:
        with tg.GradientTape() as inner:
            y = x * x * x
        dx = inner.gradient(y, x, w)
    dw = outer.gradient(dx, w)
    assert (dw.dtype, float(dw)) == ("float64", 12.0)


def test_O13_the_callers_weights_are_not_changed():
    x = tg.Variable([1.0, 2.0])
    for weights in (tg.constant([10.0, 100.0]), np.array([10.0, 100.0], np.float32)):
        tape, targets = recorded(lambda: [x + 1.0, x - 1.0, x * x])
        dx = tape.gradient(targets, x, [weights, weights, weights])
        np.testing.assert_array_equal(dx, [40.0, 600.0])  # w (2 + 2 x)
        np.testing.assert_array_equal(weights, [10.0, 100.0])
