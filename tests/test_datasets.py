"""The named data sets: what they hold, where they are looked for, and what is never kept."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import pathlib
import struct
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest

from tapegrad import data
from tapegrad.data import datasets
from tapegrad.errors import FormatError

FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">2x2B{array.ndim}I", 8, array.ndim, *array.shape) + array.tobytes()


def collection() -> dict[str, bytes]:
    """Ten training and five test images of 2 x 3 pixels, as the four files of MNIST."""
    pixels = np.arange(60, dtype="u1").reshape(10, 2, 3)
    labels = np.arange(10, dtype="u1")
    arrays = (pixels, labels, 255 - pixels[:5], labels[:5])
    return {
        name: gzip.compress(idx(array), mtime=0) for name, array in zip(FILES, arrays, strict=True)
    }


def fill(folder: pathlib.Path, *, plain: bool = False) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in collection().items():
        if plain:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty home, no environment variable, no Debian package, no network."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(pathlib.Path, "home", lambda: home)
    monkeypatch.delenv("TAPEGRAD_DATA", raising=False)
    monkeypatch.setattr(datasets, "_SYSTEM_FOLDER", tmp_path / "usr")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return home


# ---------------------------------------------------------------- digits


def test_digits_are_the_uci_test_set() -> None:
    digits = data.load("digits")
    assert digits.name == "digits"
    assert digits.image_shape == (8, 8)
    assert digits.classes == tuple("0123456789")
    assert digits.train_images.shape == (1438, 64)
    assert digits.test_images.shape == (359, 64)
    for array, dtype in (
        (digits.train_images, np.float32),
        (digits.test_images, np.float32),
        (digits.train_labels, np.int64),
        (digits.test_labels, np.int64),
    ):
        assert array.dtype == dtype
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    # Published in UCI's description of the data set, for its testing part.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_split_scale_and_first_image() -> None:
    digits = data.load("digits")
    images, labels = np.empty((1797, 64), np.float32), np.empty(1797, int)
    held_out = np.arange(1797) % 5 == 4
    images[held_out], images[~held_out] = digits.test_images, digits.train_images
    labels[held_out], labels[~held_out] = digits.test_labels, digits.train_labels
    assert labels[:20].tolist() == [*range(10)] * 2
    # The first line of optdigits.tes, a zero.
    first = "0 0 5 13 9 1 0 0 0 0 13 15 10 15 5 0 0 3 15 2 0 11 8 0 0 4 12 0 0 8 8 0"
    assert (images[0, :32] * 16).tolist() == [float(value) for value in first.split()]
    # The sum over scikit-learn's copy.
    assert int((images * 16).sum(dtype=np.float64)) == 561718
    assert np.bincount(digits.test_labels).min() >= 21


def test_digits_agree_with_scikit_learn() -> None:
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    digits = data.load("digits")
    held_out = np.arange(1797) % 5 == 4
    np.testing.assert_array_equal(digits.test_images * 16, theirs.data[held_out])
    np.testing.assert_array_equal(digits.train_images * 16, theirs.data[~held_out])
    np.testing.assert_array_equal(digits.test_labels, theirs.target[held_out])
    np.testing.assert_array_equal(digits.train_labels, theirs.target[~held_out])


def test_dataset_is_frozen_and_short_to_print() -> None:
    digits = data.load("digits")
    with pytest.raises(AttributeError):
        digits.name = "other"  # type: ignore[misc]
    assert repr(digits) == ("<Dataset digits: 1438 + 359 examples of shape (8, 8), 10 classes>")


def test_credit_for_the_digits() -> None:
    assert datasets.__doc__ is not None
    for part in ("Alpaydin", "Kaynak", "UCI Machine Learning Repository", "CC BY 4.0"):
        assert part in datasets.__doc__


# ---------------------------------------------------------------- MNIST and Fashion-MNIST


@pytest.mark.parametrize("plain", [False, True])
def test_collection_from_a_folder(tmp_path: pathlib.Path, plain: bool) -> None:
    mnist = data.load("mnist", fill(tmp_path / "files", plain=plain))
    pixels = np.arange(60).reshape(10, 6)
    np.testing.assert_array_equal(mnist.train_images, (pixels / 255).astype(np.float32))
    np.testing.assert_array_equal(mnist.test_images, ((255 - pixels[:5]) / 255).astype("f4"))
    assert mnist.train_labels.tolist() == [*range(10)]
    assert mnist.test_labels.tolist() == [*range(5)]
    assert mnist.train_labels.dtype == np.int64
    assert mnist.image_shape == (2, 3)
    assert mnist.classes == tuple("0123456789")


def test_classes_of_fashion_mnist(tmp_path: pathlib.Path) -> None:
    fashion = data.load("fashion-mnist", str(fill(tmp_path / "files")))
    assert fashion.classes[0] == "T-shirt/top"
    assert fashion.classes[9] == "Ankle boot"
    assert len(fashion.classes) == 10


def test_order_of_the_search(
    tmp_path: pathlib.Path, nothing_installed: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place wins over those found before: system, cache, environment, folder."""
    monkeypatch.setenv("TAPEGRAD_DATA", str(tmp_path / "data"))
    places = [
        tmp_path / "usr" / "fashion-mnist",
        nothing_installed / ".cache" / "tapegrad" / "fashion-mnist",
        tmp_path / "data" / "fashion-mnist",
    ]
    for number, place in enumerate(places):
        fill(place)
        (place / FILES[3]).write_bytes(gzip.compress(idx(np.full(5, number, "u1"))))
        assert data.load("fashion-mnist").test_labels.tolist() == [number] * 5
    fill(tmp_path / "mine")
    assert data.load("fashion-mnist", tmp_path / "mine").test_labels.tolist() == [*range(5)]


def test_missing_files_say_where_and_what_to_do(
    tmp_path: pathlib.Path, nothing_installed: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPEGRAD_DATA", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion-mnist")
    for part in (
        *FILES,
        str(tmp_path / "data" / "fashion-mnist"),
        str(nothing_installed / ".cache" / "tapegrad" / "fashion-mnist"),
        str(tmp_path / "usr" / "fashion-mnist"),
        "load('fashion-mnist', download=True)",
        "folder=",
        "apt install dataset-fashion-mnist",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert str(nothing_installed) not in str(caught.value)
    assert "apt" not in str(caught.value)


def test_unknown_name() -> None:
    message = (
        r"unknown data set 'imagenet': give one of 'digits', 'mnist', 'fashion-mnist', "
        r"or the path of an .npz or .csv file"
    )
    with pytest.raises(ValueError, match=message):
        data.load("imagenet")


def test_collection_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    folder = fill(tmp_path / "files")
    for name, array, match in [
        (FILES[1], np.zeros(9, "u1"), r"labels must be integers of shape \(10,\).*\(9,\)"),
        (FILES[1], np.full(10, 10, "u1"), "labels run from 0 to 10, not 0 to 9"),
        (FILES[2], np.zeros((5, 3, 2), "u1"), r"shape \(2, 3\), test_images of \(3, 2\)"),
        (FILES[0], np.zeros(10, "u1"), "images must be real numbers of shape"),
        (FILES[0], np.zeros((0, 2, 3), "u1"), "images must be real numbers of shape"),
    ]:
        fill(folder)
        (folder / name).write_bytes(gzip.compress(idx(array)))
        with pytest.raises(FormatError, match=match) as caught:
            data.load("mnist", folder)
        assert str(folder) in str(caught.value)
    (folder / FILES[0]).write_bytes(b"junk")
    with pytest.raises(FormatError, match="not an IDX file"):
        data.load("mnist", folder)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_SYSTEM_FOLDER", DEBIAN.parent)
    fashion = data.load("fashion-mnist")
    assert fashion.train_images.shape == (60_000, 784)
    assert fashion.test_images.shape == (10_000, 784)
    assert np.bincount(fashion.train_labels).tolist() == [6000] * 10
    assert np.bincount(fashion.test_labels).tolist() == [1000] * 10
    assert fashion.image_shape == (28, 28)
    # The mean pixel that is published with the data set's benchmarks.
    assert fashion.train_images.mean(dtype=np.float64) == pytest.approx(0.2860, abs=5e-5)


# ---------------------------------------------------------------- download


class Server:
    """Answers urlopen from a dict: bytes are content, an exception is raised."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    def urlopen(self, url: str, timeout: float) -> io.BytesIO:
        assert timeout > 0
        self.asked.append(url)
        answer = self.answers[url]
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Two addresses for the little collection, with its true sums; the first is out of order."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in collection().items()}
    mnist = datasets._COLLECTIONS["mnist"]._replace(addresses=("one:/", "two:/"), sha256=sums)
    monkeypatch.setitem(datasets._COLLECTIONS, "mnist", mnist)
    answers: dict[str, Any] = {f"one:/{name}": urllib.error.URLError("down") for name in FILES} | {
        f"two:/{name}": content for name, content in collection().items()
    }
    server = Server(answers)
    monkeypatch.setattr(urllib.request, "urlopen", server.urlopen)
    return server


def test_download_into_a_folder(tmp_path: pathlib.Path, server: Server) -> None:
    folder = tmp_path / "new" / "folder"
    assert len(data.load("mnist", folder, download=True).train_labels) == 10
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert server.asked[:2] == [f"one:/{FILES[0]}", f"two:/{FILES[0]}"]
    server.asked.clear()
    data.load("mnist", folder, download=True)
    assert not server.asked


def test_download_into_the_cache_or_the_environment(
    tmp_path: pathlib.Path,
    nothing_installed: pathlib.Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data.load("mnist", download=True)
    assert (nothing_installed / ".cache" / "tapegrad" / "mnist" / FILES[0]).exists()
    for path in (nothing_installed / ".cache" / "tapegrad" / "mnist").iterdir():
        path.unlink()
    monkeypatch.setenv("TAPEGRAD_DATA", str(tmp_path / "data"))
    data.load("mnist", download=True)
    assert (tmp_path / "data" / "mnist" / FILES[0]).exists()


def test_download_fetches_only_what_is_missing(tmp_path: pathlib.Path, server: Server) -> None:
    folder = fill(tmp_path / "files")
    (folder / FILES[2]).unlink()
    data.load("mnist", folder, download=True)
    assert {url.split("/")[1] for url in server.asked} == {FILES[2]}


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"<html>log in here</html>", "24 bytes with SHA-256 .*, expected"),
        (b"", "0 bytes with SHA-256"),
        (bytes(33 << 20), "33554433 bytes with SHA-256"),
        (http.client.IncompleteRead(b""), "IncompleteRead"),
        (TimeoutError("timed out"), "timed out"),
    ],
    ids=["page", "empty", "huge", "incomplete", "timeout"],
)
def test_wrong_download_is_never_kept(
    tmp_path: pathlib.Path, server: Server, answer: Any, match: str
) -> None:
    server.answers[f"two:/{FILES[1]}"] = answer
    with pytest.raises(
        OSError, match=f"could not download {FILES[1]}: one:/.*down.*two:/.*{match}"
    ):
        data.load("mnist", tmp_path / "files", download=True)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [FILES[0]]


def test_addresses_and_sums_of_the_real_collections() -> None:
    for name in ("mnist", "fashion-mnist"):
        collection = datasets._COLLECTIONS[name]
        assert {*collection.sha256} == {*FILES}
        assert all(len(bytes.fromhex(digest)) == 32 for digest in collection.sha256.values())
        assert all(address.endswith("/") for address in collection.addresses)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_with_a_test_part(tmp_path: pathlib.Path, keys: tuple[str, ...]) -> None:
    path = tmp_path / "set.npz"
    images = np.arange(24, dtype="u1").reshape(6, 2, 2)
    arrays = (images, np.arange(6)[:, None], images[:2], np.array([5, 1], "u1"))
    named: dict[str, Any] = dict(zip(keys, arrays, strict=True))
    np.savez(path, **named)
    dataset = data.load(path)
    assert dataset.name == str(path)
    np.testing.assert_array_equal(dataset.train_images, (images / 255).reshape(6, 4).astype("f4"))
    assert dataset.train_labels.tolist() == [*range(6)]
    assert dataset.test_labels.tolist() == [5, 1]
    assert dataset.classes == tuple("012345")
    assert dataset.image_shape == (2, 2)


@pytest.mark.parametrize("keys", [("x_train", "y_train"), ("images", "labels")])
def test_npz_without_a_test_part(tmp_path: pathlib.Path, keys: tuple[str, str]) -> None:
    features = np.arange(22.0).reshape(11, 2)
    labels = np.arange(11) % 3
    arrays: dict[str, Any] = {keys[0]: features, keys[1]: labels, "other": labels}
    np.savez(tmp_path / "set.npz", **arrays)
    dataset = data.load(str(tmp_path / "set.npz"))
    np.testing.assert_array_equal(dataset.test_images, features[[4, 9]].astype("f4"))
    np.testing.assert_array_equal(dataset.train_images, np.delete(features, [4, 9], 0))
    assert dataset.test_labels.tolist() == [1, 0]
    assert dataset.classes == ("0", "1", "2")
    assert dataset.image_shape == (2,)


@pytest.mark.parametrize("labels", [[-1, 1, 1, -1], [0, 1, 2, 10**6]])
def test_labels_that_number_no_classes(tmp_path: pathlib.Path, labels: list[int]) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((4, 2)), labels=labels)
    assert data.load(tmp_path / "set.npz").classes == ()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"a": np.zeros(2)}, r"needs arrays \(train_images, .* or \(x_train, .*; it has a$"),
        (
            {"x_train": np.zeros((4, 2)), "y_train": np.arange(4), "x_test": np.zeros((1, 2))},
            "it has x_train, y_train, x_test",
        ),
        (
            {
                "images": np.zeros((4, 2)),
                "labels": np.arange(4),
                "test_images": np.zeros((1, 2)),
                "test_labels": np.arange(1),
            },
            "it has images, labels, test_images, test_labels",
        ),
        ({"images": np.zeros((4, 2)), "labels": np.zeros(4)}, "labels must be integers"),
        ({"images": np.zeros((4, 2)), "labels": np.zeros((4, 2), int)}, "labels must be integers"),
        ({"images": np.zeros((4, 2), "c8"), "labels": np.arange(4)}, "images must be real numbers"),
        ({"images": np.full((4, 2), 1e39), "labels": np.arange(4)}, "beyond float32"),
        (
            {
                "x_train": np.full((4, 2), 255, "u1"),
                "y_train": np.arange(4),
                "x_test": np.full((1, 2), 255.0),
                "y_test": np.arange(1),
            },
            "x_train are uint8, x_test float64, and only uint8 is divided by 255: store both",
        ),
        (
            {"images": np.zeros((1, 2)), "labels": np.array([2**63], "u8")},
            "a label of 9223372036854775808 is beyond int64",
        ),
    ],
)
def test_npz_that_is_no_data_set(
    tmp_path: pathlib.Path, arrays: dict[str, Any], match: str
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(FormatError, match=match):
        data.load(tmp_path / "set.npz")


def test_csv(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "flowers.csv"
    path.write_text("long,wide,kind\n" + "".join(f"{n},{2 * n},{'ab'[n % 2]}\n" for n in range(6)))
    dataset = data.load(path)
    assert dataset.classes == ("a", "b")
    assert dataset.train_labels.tolist() == [0, 1, 0, 1, 1]
    assert dataset.test_images.tolist() == [[4, 8]]
    assert dataset.test_labels.tolist() == [0]
    assert dataset.image_shape == (2,)


def test_csv_with_integer_labels(tmp_path: pathlib.Path) -> None:
    (tmp_path / "set.csv").write_text("1,0\n2,1\n3,1\n")
    assert data.load(tmp_path / "set.csv").classes == ("0", "1")


@pytest.mark.parametrize("name", ["none.npz", "none.csv"])
def test_missing_file(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        data.load(tmp_path / name)
