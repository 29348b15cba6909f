"""Named data sets to train on, found on disk, fetched on request, or taken from a file.

The handwritten digits that come with the package are the test part of "Optical Recognition of
Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository (1998),
https://doi.org/10.24432/C50P49, licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/); unchanged but for the file format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tapegrad._files import atomic_write
from tapegrad.data.formats import read_csv, read_idx
from tapegrad.data.npz import read_npz
from tapegrad.errors import FormatError


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images (or other features) with labels, in a part to train on and a part to test on.

    Args:
        name: what it was loaded as.
        train_images: float32 of shape (examples, features).
        train_labels: int64 of shape (examples,).
        test_images: as train_images.
        test_labels: as train_labels.
        classes: the name of each label; empty where labels do not number classes.
        image_shape: the shape that one row of images had in the file, (28, 28) for instance.
    """

    name: str
    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    image_shape: tuple[int, ...]

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.name}: {len(self.train_labels)} + {len(self.test_labels)} examples "
            f"of shape {self.image_shape}, {len(self.classes)} classes>"
        )


class _Collection(NamedTuple):
    """Four IDX files as MNIST's authors named them, and where the world keeps them."""

    addresses: tuple[str, ...]
    sha256: dict[str, str]
    classes: tuple[str, ...]
    package: str | None = None


_DIGIT_NAMES = tuple("0123456789")
_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_FILES = tuple(f"{part}-ubyte.gz" for part in _PARTS)

# The published MD5 sums of Fashion-MNIST belong to the same files as these SHA-256 sums.
_COLLECTIONS = {
    "mnist": _Collection(
        addresses=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            _FILES[0]: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            _FILES[1]: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            _FILES[2]: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            _FILES[3]: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        classes=_DIGIT_NAMES,
    ),
    "fashion-mnist": _Collection(
        addresses=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        sha256={
            _FILES[0]: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            _FILES[1]: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            _FILES[2]: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            _FILES[3]: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        package="dataset-fashion-mnist",
    ),
}

_SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian's packages of data put it
_MAX_DOWNLOAD = 32 << 20  # the largest of the files has 26,421,880 bytes
_TIMEOUT_SECONDS = 30

_KEYS = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels"),
)


def load(
    name: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Dataset:
    """Loads a data set: one known by name, or an .npz or .csv file.

    Without a test part of its own (the digits, .csv, most .npz) every fifth example, those whose
    index leaves 4 when divided by 5, is the test part.

    Args:
        name: "digits" (1,797 images of 8 x 8, in the package), "mnist" or "fashion-mnist"
            (60,000 + 10,000 images of 28 x 28), or the path of a file ending in .npz, with arrays
            x_train, y_train, x_test, y_test (or train_images, train_labels, ...; or images,
            labels), or in .csv, with the label in the last column.
        folder: where the four IDX files of "mnist" or "fashion-mnist" are, gzipped or not. If not
            given: the folder of that name in the folder that the environment variable
            TAPEGRAD_DATA names, then in ~/.cache/tapegrad, then what a Debian package installed.
        download: fetch what is missing, into `folder` or the first of the folders above.

    Returns:
        The Dataset. The named ones and files of uint8 images (divided by 255) have images in
        [0, 1]; other numbers in files are kept as they are.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if the files are nowhere; the message says where it looked.
        FormatError: if a file is malformed, or images and labels do not go together.
        OSError: if downloading fails.

    >>> tg.data.load("digits")
    <Dataset digits: 1438 + 359 examples of shape (8, 8), 10 classes>
    """
    text = os.fspath(name)
    if text == "digits":
        shipped = read_npz(Path(__file__).with_name("digits.npz"))
        shipped["images"] = shipped["images"].reshape(-1, 8, 8)
        return _from_arrays(text, text, shipped, white=16, classes=_DIGIT_NAMES)
    if text in _COLLECTIONS:
        place = _find(text, None if folder is None else Path(folder), download=download)
        files = (_existing(place, file) or place / file for file in _FILES)
        arrays = {key: read_idx(file) for key, file in zip(_KEYS[0], files, strict=True)}
        return _from_arrays(text, str(place), arrays, classes=_COLLECTIONS[text].classes)
    if text.endswith(".npz"):
        return _from_arrays(text, text, read_npz(text))
    if text.endswith(".csv"):
        table = read_csv(text)
        assert table.labels is not None
        arrays = {"images": table.features, "labels": table.labels}
        return _from_arrays(text, text, arrays, classes=table.classes)
    raise ValueError(
        f"[load] unknown data set {text!r}: give one of "
        f"{', '.join(map(repr, ('digits', *_COLLECTIONS)))}, or the path of an .npz or .csv file"
    )


def _existing(folder: Path, file: str) -> Path | None:
    candidates = (folder / file, folder / file.removesuffix(".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _find(name: str, folder: Path | None, *, download: bool) -> Path:
    """The folder that holds all four files of a collection, after fetching what is missing."""
    collection = _COLLECTIONS[name]
    if folder is not None:
        places = [folder]
    else:
        places = [Path.home() / ".cache" / "tapegrad" / name]
        if root := os.environ.get("TAPEGRAD_DATA"):
            places.insert(0, Path(root, name))
        if collection.package:
            places.append(_SYSTEM_FOLDER / name)
    for place in places:
        if all(_existing(place, file) for file in _FILES):
            return place
    if download:
        places[0].mkdir(parents=True, exist_ok=True)
        for file in _FILES:
            if _existing(places[0], file) is None:
                _fetch(collection, file, places[0] / file)
        return places[0]
    package = f", or on Debian: apt install {collection.package}" if collection.package else ""
    raise FileNotFoundError(
        f"[load] {name!r} needs the files {', '.join(_FILES)} (gzipped or not), and they are not "
        f"all in {' or '.join(map(str, places))}: call load({name!r}, download=True), "
        "or pass the folder that has them as folder=... (on the command line: --download, "
        f"--data-folder){package}"
    )


def _fetch(collection: _Collection, file: str, target: Path) -> None:
    """Downloads one file from the first address that has it; a wrong one is never kept."""
    # Imported late: it takes longer than everything else that tapegrad imports but NumPy.
    import http.client
    import urllib.request

    problems = []
    for address in collection.addresses:
        url = address + file
        try:
            with (
                urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
                atomic_write(target) as output,
            ):
                content = response.read(_MAX_DOWNLOAD + 1)
                digest = hashlib.sha256(content).hexdigest()
                if digest != collection.sha256[file]:
                    raise FormatError(
                        f"{len(content)} bytes with SHA-256 {digest}, "
                        f"expected {collection.sha256[file]}"
                    )
                output.write(content)
            return
        except (OSError, http.client.HTTPException, FormatError) as error:
            problems.append(f"{url}: {error}")
    raise OSError(f"[load] could not download {file}: {'; '.join(problems)}")


def _from_arrays(
    name: str,
    where: str,
    arrays: Mapping[str, NDArray[Any]],
    *,
    white: int = 255,
    classes: tuple[str, ...] = (),
) -> Dataset:
    keys = next((keys for keys in _KEYS if {*keys[:2]} <= arrays.keys()), ())
    found = [key for key in keys if key in arrays]
    # A test part under names of another row would be left aside without a word.
    others = [key for row in _KEYS for key in row if key in arrays and key not in keys]
    if len(found) not in (2, 4) or others:
        raise FormatError(
            f"{where}: needs arrays {' or '.join('(' + ', '.join(keys) + ')' for keys in _KEYS)}, "
            f"the test part being optional; it has {', '.join(arrays)}"
        )
    images, labels = _examples(where, arrays[found[0]], arrays[found[1]], white)
    image_shape = arrays[found[0]].shape[1:]
    if len(found) == 4:
        test_images, test_labels = _examples(where, arrays[found[2]], arrays[found[3]], white)
        if arrays[found[2]].shape[1:] != image_shape:
            raise FormatError(
                f"{where}: {found[0]} are of shape {image_shape}, "
                f"{found[2]} of {arrays[found[2]].shape[1:]}"
            )
        kinds = [arrays[key].dtype for key in (found[0], found[2])]
        if kinds[0] != kinds[1] and np.uint8 in kinds:
            raise FormatError(
                f"{where}: {found[0]} are {kinds[0]}, {found[2]} {kinds[1]}, and only uint8 is "
                f"divided by {white}: store both as one type"
            )
    else:
        held_out = np.arange(len(labels)) % 5 == 4
        test_images, test_labels = images[held_out], labels[held_out]
        images, labels = images[~held_out], labels[~held_out]
    lowest = min(labels.min(), test_labels.min(initial=0))
    highest = int(max(labels.max(), test_labels.max(initial=0)))
    if classes:
        if lowest < 0 or highest >= len(classes):
            raise FormatError(
                f"{where}: labels run from {lowest} to {highest}, not 0 to {len(classes) - 1}"
            )
    # A label of a billion must not make a billion class names.
    elif lowest >= 0 and highest < len(labels):
        classes = tuple(map(str, range(highest + 1)))
    return Dataset(
        name, images, labels, test_images, test_labels, classes, tuple(map(int, image_shape))
    )


def _examples(
    where: str, images: NDArray[Any], labels: NDArray[Any], white: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images as rows of float32, `white` becoming 1 in bytes; labels as int64; both checked."""
    if images.ndim < 2 or images.dtype.kind not in "buif" or not images.size:
        raise FormatError(
            f"{where}: images must be real numbers of shape (examples, ...), "
            f"got {images.dtype} of shape {images.shape}"
        )
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise FormatError(
            f"{where}: labels must be integers of shape ({len(images)},) to go with the images, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if labels.max() > np.iinfo(np.int64).max:
        raise FormatError(f"{where}: a label of {labels.max()} is beyond int64")
    rows = images.reshape(len(images), -1)
    if rows.dtype == np.uint8:
        values = np.divide(rows, white, dtype=np.float32)
    else:
        try:
            with np.errstate(over="raise"):
                values = rows.astype(np.float32)
        except FloatingPointError:
            raise FormatError(f"{where}: an image value is beyond float32") from None
    return values, labels.reshape(-1).astype(np.int64)
