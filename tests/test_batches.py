"""Mini-batches: every row once an epoch, in an order that the seed alone decides."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapegrad as tg
from tapegrad.data import Batches


def rows(batches):
    """Return the rows of an epoch of a single array, in the order in which they came."""
    return [row for batch in batches for row in batch.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70),
    batch_size=st.integers(1, 80),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**64),
)
def test_every_row_comes_once_an_epoch(n, batch_size, shuffle, drop_last, seed):
    x = np.arange(n)
    batches = Batches(x, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    sizes = [batch_size] * (n // batch_size)
    if n % batch_size and not drop_last:
        sizes.append(n % batch_size)
    assert len(batches) == len(sizes)
    assert batches.rows == n
    for _ in range(2):
        epoch = list(batches)
        assert [len(batch) for batch in epoch] == sizes
        found = rows(epoch)
        if not shuffle:
            assert found == list(range(sum(sizes)))
        assert len(set(found)) == len(found) == sum(sizes)
        assert set(found) <= set(range(n))
    assert not drop_last or len(batches) == math.floor(n / batch_size)


def test_each_epoch_has_an_order_of_its_own():
    batches = Batches(np.arange(100), 7, shuffle=True, seed=0)
    orders = [tuple(rows(batches)) for _ in range(5)]
    assert len(set(orders)) == 5
    assert tuple(range(100)) not in orders


def test_the_seed_decides_the_order():
    def epochs(seed):
        batches = Batches(np.arange(50), 8, shuffle=True, seed=seed)
        return [rows(batches), rows(batches)]

    assert epochs(3) == epochs(3)
    assert epochs(3) != epochs(4)
    # The batch size cuts the same order elsewhere.
    assert rows(Batches(np.arange(50), 11, shuffle=True, seed=3)) == epochs(3)[0]


def test_without_a_seed_the_common_stream_decides():
    def epochs():
        batches = Batches(np.arange(50), 8, shuffle=True)
        return [rows(batches), rows(batches)]

    tg.random.seed(1)
    first = epochs()
    assert epochs() != first
    tg.random.seed(1)
    assert epochs() == first


def test_a_seed_of_its_own_leaves_the_common_stream_alone():
    tg.random.seed(1)
    expected = tg.random.uniform((3,)).tolist()
    tg.random.seed(1)
    rows(Batches(np.arange(50), 8, shuffle=True, seed=3))
    rows(Batches(np.arange(50), 8))  # nor does an order that is not shuffled draw from it
    assert tg.random.uniform((3,)).tolist() == expected


def test_every_order_is_as_likely_as_another():
    batches = Batches(np.arange(3), 3, shuffle=True, seed=5)
    counts = collections.Counter(tuple(rows(batches)) for _ in range(1200))
    assert set(counts) == set(itertools.permutations(range(3)))
    # Chi-squared with 5 degrees of freedom: above 20.5 once in a thousand seeds, and the seed is 5.
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 20.5


def test_rows_of_all_arrays_stay_together():
    x = np.arange(20).reshape(20, 1) * [1, 10]
    y = np.arange(20) * 100
    for a, b in Batches((x, y), 6, shuffle=True, seed=1):
        assert a.shape == (len(b), 2)
        np.testing.assert_array_equal(a[:, 0] * 100, b)
        np.testing.assert_array_equal(a[:, 1] * 10, b)


def test_two_iterations_at_once_do_not_mix():
    batches = Batches(np.arange(30), 7, shuffle=True, seed=2)
    expected = [rows(Batches(np.arange(30), 7, shuffle=True, seed=2))]
    first, second = iter(batches), iter(batches)
    seen = [[], []]
    for a, b in zip(first, second, strict=True):
        seen[0] += a.tolist()
        seen[1] += b.tolist()
    assert seen[0] == expected[0]
    assert sorted(seen[1]) == list(range(30))
    assert seen[1] != seen[0]


# ---- structures

Pair = collections.namedtuple("Pair", "x y")


def test_batches_have_the_structure_of_the_arrays():
    x, y, z = np.arange(5.0), np.arange(5), np.arange(10).reshape(5, 2)
    given = {"inputs": (x, z), "y": y}
    batch = next(iter(Batches(given, 2)))
    assert list(batch) == ["inputs", "y"]
    assert type(batch["inputs"]) is tuple
    np.testing.assert_array_equal(batch["inputs"][1], [[0, 1], [2, 3]])
    single = next(iter(Batches(x, 2)))
    assert isinstance(single, tg.Tensor)


def test_named_tuples_stay_named_tuples():
    batch = next(iter(Batches(Pair(np.arange(5.0), np.arange(5)), 2)))
    assert isinstance(batch, Pair)
    np.testing.assert_array_equal(batch.y, [0, 1])


def test_a_list_is_one_array():
    np.testing.assert_array_equal(
        next(iter(Batches([[1, 2], [3, 4], [5, 6]], 2))), [[1, 2], [3, 4]]
    )


def test_types_are_kept():
    arrays = tuple(np.ones(4, kind) for kind in ("uint8", "float64", "float32", "int32", "bool"))
    for shuffle in (False, True):
        batch = next(iter(Batches(arrays, 3, shuffle=shuffle)))
        assert [x.dtype for x in batch] == [x.dtype for x in arrays]
    assert next(iter(Batches([1.5, 2.5], 2))).dtype == np.float32


def test_batches_are_values_of_their_own():
    x = np.arange(6.0)
    batches = Batches(x, 3)
    batch = next(iter(batches))
    x[:] = -1.0
    np.testing.assert_array_equal(batch, [0.0, 1.0, 2.0])
    assert rows(batches) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_variables_and_tensors():
    assert rows(Batches(tg.constant([1, 2, 3]), 2)) == [1, 2, 3]
    assert rows(Batches(tg.Variable([1.0, 2.0, 3.0]), 2)) == [1.0, 2.0, 3.0]


# ---- with a tape


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_tape_around_the_loop_records_what_the_loop_does(shuffle):
    w = tg.Variable(2.0)
    total = 0.0
    with tg.GradientTape() as tape:
        for x in Batches([1.0, 2.0, 3.0, 4.0, 5.0], 2, shuffle=shuffle):
            total = total + tg.sum(w * w * x)
    assert float(tape.gradient(total, w)) == 2 * 2.0 * 15.0


def test_taking_a_batch_inside_the_tapes_block():
    w = tg.Variable(2.0)
    batches = iter(Batches([1.0, 2.0, 3.0], 1))
    next(batches)
    with tg.GradientTape() as tape:
        before = w * 3.0
        x = next(batches)
        y = before + tg.sum(w * x)
    batches.close()
    assert float(tape.gradient(y, w)) == 3.0 + 2.0


def test_a_tape_of_each_step():
    w = tg.Variable(2.0)
    found = []
    for x in Batches([1.0, 2.0, 3.0], 2):
        with tg.GradientTape() as tape:
            y = tg.sum(w * x)
        found.append(float(tape.gradient(y, w)))
    assert found == [3.0, 3.0]


def test_a_loop_that_is_left_early():
    w = tg.Variable(2.0)
    for _ in Batches([1.0, 2.0, 3.0], 1):
        break
    kept = iter(Batches([1.0, 2.0, 3.0], 1))
    next(kept)  # never asked again
    with tg.GradientTape() as tape:
        y = w * w
    assert float(tape.gradient(y, w)) == 4.0


# ---- errors


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            (np.ones(3), np.ones(4)),
            r"equally many rows: arrays\[0\] has 3, arrays\[1\] has 4",
        ),
        (
            {"x": np.ones(3), "y": (np.ones(3), np.ones(2))},
            r"arrays\['x'\] has 3, arrays\['y'\]\[0\] has 3, arrays\['y'\]\[1\] has 2",
        ),
        ((np.ones(3), 1.0), r"arrays\[1\] is a 0-d tensor and has no rows"),
        (5.0, "arrays is a 0-d tensor and has no rows"),
        ((), "all arrays must have equally many rows: there are none"),
        ([[1.0], [1.0, 2.0]], "ragged"),
    ],
)
def test_arrays_that_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, 2)


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-3, ValueError), (2.5, TypeError)])
def test_batch_sizes_that_are_refused(size, kind):
    with pytest.raises(kind, match=r"batch_size must be at least 1, got|integer"):
        Batches(np.ones(3), size)


@pytest.mark.parametrize("seed", [-1, 1.5, "zero"])
def test_seeds_that_are_refused(seed):
    with pytest.raises(ValueError, match="a seed is an integer >= 0 or None, got"):
        Batches(np.ones(3), 2, shuffle=True, seed=seed)


def test_options_go_by_name():
    # Batches(x, 32, True) could mean shuffle or drop_last.
    with pytest.raises(TypeError, match="positional"):
        Batches(np.ones(3), 2, True)
