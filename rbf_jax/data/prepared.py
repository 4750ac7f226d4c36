"""Reading prepared data: tensorflow-datasets' array_record files to NumPy, without TensorFlow."""

import io
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rbf_jax.data.official import lookup
from rbf_jax.files import as_path, copy_file, is_remote

__all__ = ["Split", "as_float", "default_data_dir", "is_prepared", "load"]

_BATCH = 1_000  # examples decoded at a time: their Python objects are all that exists besides the result


class Split(NamedTuple):
    """Images and labels of one split, in a fixed order.

    Attributes:
        images: (N, H, W, C) uint8, 0..255.
        labels: (N,) int32, 0..9.
    """

    images: np.ndarray
    labels: np.ndarray


def as_float(images: np.ndarray) -> np.ndarray:
    """Returns images / 255 in float32.

    Args:
        images: uint8 of any shape.

    Returns:
        float32 of the same shape, in [0, 1].

    Raises:
        ValueError: if `images` is not uint8 (a second call would divide by 255 twice).
    """
    if images.dtype != np.uint8:
        raise ValueError(f"as_float takes uint8 images, not {images.dtype}")
    return images / np.float32(255)


def make_command(data_dir: str | Path | None, raw: bool = False) -> str:
    """Returns the shell command that prepares data into `data_dir`, for error messages."""
    place = "" if data_dir is None else f" DATA_DIR={shlex.quote(str(data_dir))}"
    return f"make data{place}" + (" RAW=<folder with the official files>" if raw else "")


def how_to_prepare(data_dir: str | Path | None) -> str:
    """What to do about missing data, for messages; an object store gets a copy of what this machine made."""
    if data_dir is not None and is_remote(data_dir):
        return f"{how_to_prepare(None)}; then copy {default_data_dir()}/<name> to {data_dir}"
    return f"run `{make_command(data_dir)}`, or offline `{make_command(data_dir, raw=True)}`"


def check_local(data_dir: str | Path | None) -> None:
    """Raises ValueError for an object store: data are prepared on a disk."""
    if data_dir is not None and is_remote(data_dir):
        raise ValueError(f"data_dir must be a folder of this machine, got {data_dir}: {how_to_prepare(data_dir)}")


def is_prepared(name: str, data_dir: str | Path | None = None) -> bool:
    """Says whether the complete data set is there.

    Args:
        name: "mnist" or "cifar10".
        data_dir: folder of tensorflow-datasets; None is its default, ~/tensorflow_datasets.

    Returns:
        True if `load` will read it, False if there is nothing.

    Raises:
        ValueError: if `name` is unknown, or there is something else: an incomplete version, another format (TFRECORD),
            other examples or the examples in another order.
    """
    return _open(name, data_dir) is not None


def load(name: str, split: str, data_dir: str | Path | None = None) -> Split:
    """Loads a split in the order of the official files.

    Args:
        name: "mnist" or "cifar10".
        split: "train", "test", or a slice in tensorflow-datasets' notation, such as "train[:2000]" or "train[-5000:]".
        data_dir: folder of tensorflow-datasets; None is its default, ~/tensorflow_datasets.

    Returns:
        The split; images (N, 28, 28, 1) for mnist and (N, 32, 32, 3) for cifar10.

    Raises:
        FileNotFoundError: if the data set is not prepared.
        ValueError: if `name` or `split` is unknown, or what is there is incomplete or foreign (see `is_prepared`).
    """
    builder = _open(name, data_dir)
    if builder is None:
        raise FileNotFoundError(
            f"{name} is not prepared under {data_dir or 'the default folder of tensorflow-datasets'}: "
            f"{how_to_prepare(data_dir)}."
        )
    return _read(builder, split, data_dir)


def default_data_dir() -> Path:
    """Returns tensorflow-datasets' own folder: $TFDS_DATA_DIR as it was at its import, else ~/tensorflow_datasets."""
    from tensorflow_datasets.core.constants import DATA_DIR

    return Path(DATA_DIR).expanduser()


def _open(name: str, data_dir: str | Path | None) -> Any:
    """Returns the builder of a complete data set, None where there is nothing; raises where there is something else."""
    facts = lookup(name)
    if data_dir is not None:
        data_dir = as_path(data_dir)
        data_dir = _copied(name, data_dir) if is_remote(data_dir) else data_dir
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, ParseError) as error:
        folder = f"{data_dir or default_data_dir()}/{name}/{tfds.builder_cls(name).VERSION}"
        raise ValueError(_refusal(folder, f"has a damaged dataset_info.json ({error})", data_dir)) from error
    folder = builder.data_path
    if not folder.exists():
        return None
    if not builder.is_prepared():
        raise ValueError(_refusal(folder, "is incomplete: it has no dataset_info.json", data_dir))
    file_format = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        wrong = f"is in the format {getattr(file_format, 'value', file_format)}, which only TensorFlow reads"
        raise ValueError(_refusal(folder, f"{wrong}; array_record is needed", data_dir))
    found = {split: info.num_examples for split, info in builder.info.splits.items()}
    if found != facts.sizes:
        raise ValueError(_refusal(folder, f"has {found} examples, not {facts.sizes}", data_dir))
    for split in facts.sizes:
        missing = [str(path) for path in builder.info.splits[split].filepaths if not path.exists()]
        if missing:
            raise ValueError(_refusal(folder, f"is incomplete: {', '.join(missing)} is missing", data_dir))
        head = _read(builder, f"{split}[:{len(facts.first_test_labels)}]", data_dir)  # opens the file: sees a cut one
        if split == "test" and tuple(head.labels.tolist()) != facts.first_test_labels:
            wrong = f"is not in the official order: its test labels begin {head.labels.tolist()}"
            raise ValueError(_refusal(folder, f"{wrong}, not {list(facts.first_test_labels)}", data_dir))
    return builder


def _copied(name: str, data_dir: Path) -> Path:
    """A folder on this machine with what an object store has of a data set, copied the first time."""
    local = Path("~/.cache/rbf_jax/data").expanduser() / str(data_dir).replace("/", "_")
    for path in data_dir.glob(f"{name}/*/*"):
        copy = local / path.relative_to(data_dir)
        if not copy.exists():
            copy_file(path, copy)
    return local


def _refusal(folder: Any, what: str, data_dir: str | Path | None) -> str:
    return f"{folder} {what}. Remove that folder or name another one (DATA_DIR=...), then {how_to_prepare(data_dir)}."


def _read(builder: Any, split: str, data_dir: str | Path | None) -> Split:
    import tensorflow_datasets as tfds
    from PIL import Image

    # Decoding here instead of in tensorflow-datasets: the same Pillow, without its advice to install OpenCV.
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _BATCH):
        try:
            records = source.__getitems__(range(start, min(start + _BATCH, len(source))))
        except RuntimeError as error:  # array_record checks sizes and hashes of what it reads
            raise ValueError(_refusal(builder.data_path, f"is damaged in {split} ({error})", data_dir)) from error
        for i, record in enumerate(records, start):
            images[i] = np.asarray(Image.open(io.BytesIO(record["image"]))).reshape(images.shape[1:])
            labels[i] = record["label"]
    return Split(images, labels)
