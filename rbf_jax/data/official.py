"""What the authors of MNIST and CIFAR-10 publish: file names, hashes, sizes, addresses.

Preparation checks raw files against them, reading checks prepared data against them.
"""

from typing import NamedTuple

__all__ = ["OFFICIAL", "OfficialSet", "lookup"]


class OfficialSet(NamedTuple):
    """One data set as published.

    Attributes:
        shape: (H, W, C) of one image.
        sizes: number of examples of each split.
        files: for each split its raw files, uncompressed, in the official order.
        sha256: hash of each raw file's *uncompressed* bytes (a mirror may compress the same bytes differently).
        first_test_labels: labels of the first test examples; they tell the official order from a shuffled one.
        downloads: address -> sha256 of the compressed file found there.
        archive: name of the tar.gz that holds the raw files, or "" where each is compressed on its own.
    """

    shape: tuple[int, int, int]
    sizes: dict[str, int]
    files: dict[str, tuple[str, ...]]
    sha256: dict[str, str]
    first_test_labels: tuple[int, ...]
    downloads: dict[str, str]
    archive: str = ""


_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/"

OFFICIAL = {
    "mnist": OfficialSet(
        shape=(28, 28, 1),
        sizes={"train": 60_000, "test": 10_000},
        files={
            "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
            "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        },
        sha256={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        first_test_labels=(7, 2, 1, 0, 4, 1, 4, 9),
        # The hashes of the compressed files are those tensorflow-datasets records (url_checksums/).
        downloads={
            _MNIST_URL
            + "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            _MNIST_URL
            + "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            _MNIST_URL
            + "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            _MNIST_URL
            + "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "cifar10": OfficialSet(
        shape=(32, 32, 3),
        sizes={"train": 50_000, "test": 10_000},
        files={
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        sha256={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        first_test_labels=(3, 8, 8, 0, 6, 6, 1, 6),
        downloads={
            _CIFAR10_URL + "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        },
        archive="cifar-10-binary.tar.gz",
    ),
}


def lookup(name: str) -> OfficialSet:
    """Returns the published facts of `name`.

    Args:
        name: "mnist" or "cifar10".

    Returns:
        Its `OfficialSet`.

    Raises:
        ValueError: if there is no such set.
    """
    if name not in OFFICIAL:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(OFFICIAL)}")
    return OFFICIAL[name]
