"""Random numbers: the generator's bits, what is made of them, streams that do not overlap."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from typing import Any

import numpy as np
import pytest

import tapegrad as tg

FLOATS = (np.float16, np.float32, np.float64)
MASK = 2**64 - 1


def philox(counter: int, key: int) -> list[int]:
    """Return the four words of one counter: Philox4x64-10 of Salmon et al. (2011), section 3.3."""
    c = [counter >> 64 * i & MASK for i in range(4)]
    k = [key >> 64 * i & MASK for i in range(2)]
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def words(key: int, start: int, count: int) -> Any:
    """Return a stream's words from a counter on; NumPy counts up before it computes."""
    steps = range(start + 1, start + 1 + -(-count // 4))
    return np.array([w for step in steps for w in philox(step, key)], np.uint64)[:count]


def fractions(bits: Any, dtype: Any) -> Any:
    """Return the highest bits of 64- or 32-bit words as multiples of 2**-m."""
    m = {np.float64: 53, np.float32: 24, np.float16: 11}[dtype]
    if dtype != np.float64:
        bits = np.stack([bits & np.uint64(2**32 - 1), bits >> np.uint64(32)], axis=1).ravel()
    width = 64 if dtype == np.float64 else 32
    return np.array([math.ldexp(int(b) >> (width - m), -m) for b in bits], dtype)


# ---- bits


def test_the_oracle_gives_the_known_answers() -> None:
    # Random123's kat_vectors, philox4x64 10, the authors' own.
    known = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert philox(0, 0) == [int(word, 16) for word in known.split()]
    known = "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"
    assert philox(2**256 - 1, 2**128 - 1) == [int(word, 16) for word in known.split()]


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**100])
def test_bits_are_those_of_philox_for_key_and_counter(seed: int) -> None:
    generator = tg.random.Generator(seed)
    for count in (1, 4, 5, 3):
        start = int(generator.counter)
        got = generator.uniform(count, dtype=tg.float64)
        bits = words(generator.key, start, count)
        np.testing.assert_array_equal(got, fractions(bits, np.float64))
        numpys = np.random.Philox(key=generator.key, counter=start).random_raw(count)
        np.testing.assert_array_equal(bits, numpys)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 33])
def test_uniform_numbers_are_the_highest_bits(dtype: Any, count: int) -> None:
    generator = tg.random.Generator(3)
    got = generator.uniform(count, dtype=dtype)
    assert (got.shape, got.dtype) == ((count,), dtype)
    bits = words(generator.key, 0, count)
    np.testing.assert_array_equal(got, fractions(bits, dtype)[:count])


# ---- streams


def test_a_seed_gives_the_same_numbers_again() -> None:
    a, b = tg.random.Generator(7), tg.random.Generator(7)
    assert a.key == b.key
    first = [a.normal(5), a.uniform((2, 3)), a.permutation(6), a.mask(9, 0.5)]
    again = [b.normal(5), b.uniform((2, 3)), b.permutation(6), b.mask(9, 0.5)]
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    a.seed(7)
    np.testing.assert_array_equal(a.normal(5), first[0])
    assert not np.array_equal(a.normal(5), first[0])
    assert tg.random.Generator(8).key != b.key


def test_the_common_stream() -> None:
    tg.random.seed(11)
    first = [tg.random.normal(4), tg.random.uniform(4), tg.random.permutation(4)]
    tg.random.seed(11)
    stream = tg.random.default_generator()
    again = [tg.random.normal(4), stream.uniform(4), stream.permutation(4)]
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(tg.random.Generator(11).normal(4), first[0])


def test_a_seed_of_ones_own_leaves_the_common_stream_alone() -> None:
    before = int(tg.random.default_generator().counter)
    a, b = tg.random.uniform(5, seed=3), tg.random.uniform(5, seed=3)
    np.testing.assert_array_equal(a, b)
    tg.random.normal(5, seed=3)
    tg.random.permutation(5, seed=3)
    tg.random.shuffle([1, 2], seed=3)
    assert int(tg.random.default_generator().counter) == before


def test_without_a_seed_streams_differ() -> None:
    a, b = tg.random.Generator(), tg.random.Generator(None)
    assert a.key != b.key
    tg.random.seed(None)
    first = tg.random.uniform(4)
    tg.random.seed(None)
    assert not np.array_equal(first, tg.random.uniform(4))


def test_draws_take_consecutive_stretches_of_the_stream() -> None:
    """A draw of any kind begins where the one before it ended: no word is used twice."""
    generator = tg.random.Generator(5)
    draws = [
        (lambda: generator.uniform(7, dtype=tg.float64), 7),
        (lambda: generator.uniform(7), 4),  # two 32-bit numbers to a word
        (lambda: generator.normal(3, dtype=tg.float64), 4),  # normals come in pairs
        (lambda: generator.mask((3, 3), 0.5), 5),
        (lambda: generator.permutation(9), 9),
        (lambda: generator.uniform(3, 0, 10, dtype=tg.int32), 3),
        (lambda: generator.uniform(0), 0),
        (lambda: generator.shuffle(np.zeros((5, 2))), 5),
    ]
    end = 0
    for draw, used in draws:
        assert int(generator.counter) == end
        draw()
        end += -(-used // 4)  # a step of the counter gives four words
    assert int(generator.counter) == end
    last = generator.uniform(4, dtype=tg.float64)
    np.testing.assert_array_equal(last, fractions(words(generator.key, end, 4), np.float64))


def test_no_number_comes_twice() -> None:
    generator = tg.random.Generator(1)
    drawn = np.concatenate([generator.uniform(n, dtype=tg.float64).numpy() for n in range(1, 90)])
    assert len(np.unique(drawn)) == len(drawn)  # 4005 of 2**53: a chance repeat has p = 1e-9


def test_generators_are_independent() -> None:
    a, b = (tg.random.Generator(s).uniform(100_000, dtype=tg.float64).numpy() for s in (1, 2))
    # The correlation of independent samples has the deviation 1 / sqrt(n).
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
    assert not np.isin(a, b).any()
    one = tg.random.Generator(1)
    tg.random.Generator(2).uniform(5)
    np.testing.assert_array_equal(one.uniform(5, dtype=tg.float64), a[:5])


def test_threads_share_a_stream_without_overlap() -> None:
    generator = tg.random.Generator(9)
    found: list[Any] = []

    def draw() -> None:
        for _ in range(50):
            found.append(generator.uniform(4, dtype=tg.float64).numpy())

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = fractions(words(generator.key, 0, 800), np.float64)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.sort(want))


# ---- distributions: bounds at four standard errors, of seeded and so unchanging numbers


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform(dtype: Any) -> None:
    n = 100_000
    x = tg.random.uniform(n, -1.0, 3.0, dtype, seed=2)
    assert x.dtype == dtype
    x = x.numpy().astype(np.float64)
    assert -1.0 <= x.min() < -0.99
    assert 2.99 < x.max() < 3.0
    assert abs(x.mean() - 1.0) < 4 * (4 / math.sqrt(12)) / math.sqrt(n)
    assert abs(x.var() - 16 / 12) < 0.02
    counts, _ = np.histogram(x, bins=20, range=(-1, 3))
    assert np.abs(counts - n / 20).max() < 4.5 * math.sqrt(n / 20)


@pytest.mark.parametrize("low", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_stays_below_its_upper_bound(dtype: Any, low: float) -> None:
    """Rounding must not reach it either: in float16 the sum 1 + 2047/2048 rounds to 2."""
    x = tg.random.uniform(200_000, low, low + 1.0, dtype=dtype, seed=4).numpy()
    assert x.min() >= low
    assert x.max() < low + 1.0


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal(dtype: Any) -> None:
    n = 100_001  # odd: the last of a pair is dropped
    x = tg.random.normal(n, dtype=dtype, seed=2)
    assert (x.shape, x.dtype) == ((n,), dtype)
    x = x.numpy().astype(np.float64)
    assert np.isfinite(x).all()
    for power, moment, deviation in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(deviation / n)
    for quantile in (-2.0, -1.0, 0.0, 1.0, 2.0):
        p = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
        assert abs((x < quantile).mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    # The two of a pair have nothing to do with each other.
    assert abs(np.corrcoef(x[:-1:2], x[1::2])[0, 1]) < 4 / math.sqrt(n / 2)


def test_normal_is_scaled_and_moved() -> None:
    unit = tg.random.normal((3, 4), dtype=tg.float64, seed=6).numpy()
    x = tg.random.normal((3, 4), mean=-2.0, stddev=0.5, dtype=tg.float64, seed=6)
    np.testing.assert_allclose(x, unit * 0.5 - 2.0, rtol=1e-15)
    assert tg.random.normal().shape == ()
    assert tg.random.normal((2, 0, 3)).shape == (2, 0, 3)
    assert tg.random.normal(2).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_integers(dtype: Any) -> None:
    x = tg.random.uniform((500, 100), 3, 13, dtype=dtype, seed=1)
    assert x.dtype == dtype
    values, counts = np.unique(x.numpy(), return_counts=True)
    np.testing.assert_array_equal(values, np.arange(3, 13))
    assert np.abs(counts - 5000).max() < 4 * math.sqrt(5000)


def test_integers_of_the_widest_range() -> None:
    generator = tg.random.Generator(1)
    x = generator.uniform(1000, -(2**52), 2**52, dtype=tg.int64).numpy()
    want = [(int(w) >> 11) - 2**52 for w in words(generator.key, 0, 1000)]
    np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_mask(probability: float) -> None:
    n = 100_000
    mask = tg.random.Generator(4).mask((n // 4, 4), probability)
    assert (mask.shape, mask.dtype) == ((n // 4, 4), np.bool_)
    share = mask.numpy().mean()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / n)


@pytest.mark.parametrize("n", [0, 1, 2, 10, 1000])
def test_permutation(n: int) -> None:
    x = tg.random.permutation(n, seed=3)
    assert x.dtype == np.int64
    np.testing.assert_array_equal(np.sort(x.numpy()), np.arange(n))


def test_every_permutation_is_as_likely() -> None:
    generator = tg.random.Generator(0)
    n = 2400
    drawn = [tuple(generator.permutation(4).tolist()) for _ in range(n)]
    counts = [drawn.count(p) for p in set(drawn)]
    assert len(counts) == 24
    assert max(abs(c - 100) for c in counts) < 4 * math.sqrt(100)


def test_shuffle_moves_whole_rows_and_gradients_find_them() -> None:
    rows = np.arange(21.0).reshape(7, 3)
    x = tg.constant(rows)
    with tg.GradientTape() as tape:
        tape.watch(x)
        y = tg.random.Generator(5).shuffle(x)
    assert not np.array_equal(y, rows)
    np.testing.assert_array_equal(y.numpy()[np.argsort(y.numpy()[:, 0])], rows)
    g = tape.gradient(y, x, output_gradients=y)
    np.testing.assert_array_equal(g, rows)
    order = tg.random.Generator(5).permutation(7).numpy()
    np.testing.assert_array_equal(y, rows[order])


# ---- dropout


def test_dropout_keeps_the_mean() -> None:
    n, rate = 100_000, 0.3
    y = tg.nn.dropout(np.full(n, 2.0), rate, generator=tg.random.Generator(1)).numpy()
    np.testing.assert_allclose(np.unique(y), [0.0, 2.0 / 0.7], rtol=1e-15)
    assert abs((y == 0).mean() - rate) < 4 * math.sqrt(rate * (1 - rate) / n)
    assert abs(y.mean() - 2.0) < 4 * 2 * math.sqrt(rate / (1 - rate) / n)


def test_dropout_passes_gradients_where_it_passed_values() -> None:
    x = tg.Variable(np.full((20, 5), 3.0))
    with tg.GradientTape() as tape:
        y = tg.nn.dropout(x, 0.5, generator=tg.random.Generator(2))
    np.testing.assert_array_equal(tape.gradient(y, x), y / 3.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dropout_keeps_the_type(dtype: Any) -> None:
    x = np.ones((3, 4), dtype)
    assert tg.nn.dropout(x, 0.25, generator=tg.random.Generator(2)).dtype == dtype
    np.testing.assert_array_equal(tg.nn.dropout(x, 0.0), x)


def test_dropout_draws_anew_each_time_and_from_the_common_stream_unless_told() -> None:
    x = np.ones(64)
    tg.random.seed(1)
    a, b = tg.nn.dropout(x, 0.5), tg.nn.dropout(x, 0.5)
    assert not np.array_equal(a, b)
    c = tg.nn.dropout(x, 0.5, generator=tg.random.Generator(1))
    np.testing.assert_array_equal(a, c)


def test_recomputing_draws_the_same_numbers() -> None:
    """`recompute_grad` runs the function again: with other masks its gradient would be wrong."""
    x = tg.Variable(np.linspace(0.5, 1.5, 64))
    tg.random.seed(3)

    def two_masks(x: Any) -> Any:
        return tg.nn.dropout(tg.nn.dropout(x * x, 0.5), 0.25)

    with tg.GradientTape() as tape:
        y = tg.recompute_grad(two_masks)(x)
    after = int(tg.random.default_generator().counter)
    g = tape.gradient(y, x).numpy()
    np.testing.assert_allclose(g, y.numpy() / x.numpy() * 2, rtol=1e-14)
    assert 0 < (g == 0).mean() < 1
    assert int(tg.random.default_generator().counter) == after  # and the stream goes on from there
    tg.random.seed(3)
    np.testing.assert_array_equal(two_masks(x), y)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_as_the_original_does(seed: int | None, copied: Any) -> None:
    generator = tg.random.Generator(seed)
    if seed is not None:
        generator.normal(3)
    twin = copied(generator)
    np.testing.assert_array_equal(twin.normal(5), generator.normal(5))
    generator.normal(1)
    assert int(twin.counter) < int(generator.counter)


# ---- errors


@pytest.mark.parametrize("seed", [-1, 1.5, "one"])
def test_seeds_are_whole_and_not_negative(seed: Any) -> None:
    match = r"a seed is an integer >= 0 or None, got "
    with pytest.raises(ValueError, match=match):
        tg.random.Generator(seed)
    with pytest.raises(ValueError, match=match):
        tg.random.seed(seed)
    with pytest.raises(ValueError, match=match):
        tg.random.uniform(2, seed=seed)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_probabilities_lie_between_0_and_1(probability: float) -> None:
    with pytest.raises(ValueError, match=r"^\[mask\] probability must be from 0 to 1, got"):
        tg.random.Generator(0).mask(2, probability)


@pytest.mark.parametrize("stddev", [-1, -0.5, math.nan])
def test_deviations_are_not_below_0(stddev: float) -> None:
    with pytest.raises(ValueError, match=r"^\[normal\] stddev must be a number >= 0, got"):
        tg.random.normal(2, stddev=stddev)
    np.testing.assert_array_equal(tg.random.normal(2, mean=3.0, stddev=0), [3.0, 3.0])


def test_a_failed_draw_leaves_the_stream_where_it_was() -> None:
    generator = tg.random.Generator(0)
    for draw in (
        lambda: generator.uniform(2, 5, 5, dtype=tg.int32),
        lambda: generator.uniform(2, dtype=tg.bool),
        lambda: generator.uniform(2, 3, 2),
        lambda: generator.uniform(-1),
        lambda: generator.normal(-1),
        lambda: generator.normal(2, stddev=-1.0),
        lambda: generator.mask((3, -1), 0.5),
        lambda: generator.normal(2, dtype=tg.int32),
        lambda: generator.mask(2, 2.0),
        lambda: generator.shuffle(1.0),
        lambda: generator.normal((2, -1)),
        lambda: generator.permutation(-1),
        lambda: generator.permutation(2.5),
    ):
        with pytest.raises((ValueError, TypeError)):
            draw()
        assert int(generator.counter) == 0


@pytest.mark.parametrize("maximum", [200, 128])
def test_integers_fit_their_type(maximum: int) -> None:
    """Numbers up to maximum - 1 must fit: 127 is the largest of int8."""
    if maximum == 128:
        assert int(tg.max(tg.random.uniform(1000, 100, 128, dtype=tg.int8, seed=1))) == 127
    else:
        with pytest.raises(ValueError, match=r"^\[uniform\].*int8"):
            tg.random.uniform(1000, 0, maximum, dtype=tg.int8, seed=1)


@pytest.mark.parametrize("shape", [-1, (-1,), (3, -1), (-1, -1), (0, -2)])
def test_no_length_is_below_0(shape: Any) -> None:
    """So small a number was rounded to none: the answer was an empty tensor."""
    generator = tg.random.Generator(0)
    for draw in (generator.uniform, generator.normal, lambda x: generator.mask(x, 0.5)):
        with pytest.raises(ValueError, match="no length below 0"):
            draw(shape)
    with pytest.raises(ValueError, match=r"^\[permutation\] an axis has no length below 0"):
        generator.permutation(-1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_range_is_finite_in_its_type(dtype: Any) -> None:
    """One of infinite width would give its upper bound every time."""
    widest = float(np.finfo(dtype).max)
    half = tg.random.uniform(100, -widest / 2, widest / 2, dtype=dtype, seed=1).numpy()
    assert len(set(half.tolist())) > 50
    for low, high in [(-widest, widest), (0.0, 4 * widest), (-0.75 * widest, 0.75 * widest)]:
        with pytest.raises(ValueError, match=r"^\[uniform\]"):
            tg.random.uniform(2, low, high, dtype=dtype)
