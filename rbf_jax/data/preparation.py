"""Official raw files -> tensorflow-datasets on disk, without TensorFlow, in the official files' order.

The data sets are the registered `mnist` and `cifar10`, written as array_record (the one format that is read by index
without TensorFlow). tensorflow-datasets' own preparation decodes raw files and encodes images with TensorFlow; here
NumPy and Pillow do both.
"""

import gzip
import hashlib
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from rbf_jax.data.official import OfficialSet, lookup
from rbf_jax.data.prepared import Split, check_local, is_prepared, make_command
from rbf_jax.files import as_path

__all__ = ["prepare"]


def prepare(name: str, raw_dir: str | Path, data_dir: str | Path | None = None) -> bool:
    """Writes the official raw files of a data set as tensorflow-datasets, in their order.

    A folder of tensorflow-datasets appears by one rename when all is written: a preparation that was killed leaves an
    `incomplete.*` folder, which nothing reads.

    Args:
        name: "mnist" (idx files, gzipped or not) or "cifar10" (binary version: .bin files or the .tar.gz).
        raw_dir: folder with the raw files, directly, in `<name>/`, or in `cifar-10-batches-bin/` in either.
        data_dir: folder of tensorflow-datasets; None is its default, ~/tensorflow_datasets.

    Returns:
        True where it wrote, False where the complete set was there already (`raw_dir` is then not looked at).

    Raises:
        FileNotFoundError: if a raw file is missing.
        ValueError: if a raw file is not the official one, `data_dir` is an object store, or holds a version that is
            incomplete or was not written by this function.
    """
    if is_prepared(name, data_dir):
        return False
    check_local(data_dir)
    arrays = _read_raw(name, Path(raw_dir).expanduser(), data_dir)
    try:
        _builder(name, arrays, data_dir).download_and_prepare()
    except OSError:
        # Another process may have finished the same set while this one wrote: its folder stands, ours is not needed.
        if not is_prepared(name, data_dir):
            raise
        return False
    return is_prepared(name, data_dir)  # reads it back: raises where sizes or order are not the official ones


def _builder(name: str, arrays: dict[str, Split], data_dir: str | Path | None) -> Any:
    """Returns a builder of the registered data set that generates its examples from `arrays`."""
    import tensorflow_datasets as tfds
    from PIL import Image

    registered: Any = tfds.builder_cls(name)

    class FromArrays(registered, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        pkg_dir_path = None  # infer nothing from this file's place: there are no metadata files here
        code_path = None  # nor checksums; looking for them needs importlib_resources, which nothing declares

        def _log_download_bytes(self):
            """Silences "Downloading and preparing dataset Unknown size": nothing is downloaded here."""

        def _log_download_done(self):
            """Silences "downloaded and prepared"."""

        def _info(self):
            info = super()._info()
            # Without this examples are written in the order of a hash of their keys.
            info._info_proto.disable_shuffling = True
            return info

        # A parameter named `pipeline` here would make tensorflow-datasets import Apache Beam.
        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(split, *data) for split, data in arrays.items()}

        def _generate_examples(self, split, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                # A NumPy image would be encoded by tf.image.encode_png; a Pillow image is encoded by Pillow.
                example = {"image": Image.fromarray(image.squeeze()), "label": int(label)}
                if "id" in self.info.features:
                    example["id"] = f"{split}_{i:05d}"
                yield i, example

    FromArrays.name = registered.name  # after the class body, which sets it from the class name
    return FromArrays(data_dir=None if data_dir is None else as_path(data_dir), file_format="array_record")


def _read_raw(name: str, raw_dir: Path, data_dir: str | Path | None) -> dict[str, Split]:
    """Reads, checks and parses the raw files of `name` found under `raw_dir`."""
    facts = lookup(name)
    advice = f"Put the official files in one folder and run `{make_command(data_dir, raw=True)}`."
    raw = _find(name, facts, raw_dir, advice)
    for file, (path, content) in raw.items():
        found = hashlib.sha256(content).hexdigest()
        if found != facts.sha256[file]:
            raise ValueError(
                f"{path} is not the official {file}: its {len(content)} uncompressed bytes have sha256 {found}, "
                f"the official ones {facts.sha256[file]}. It is damaged, cut short, or another file. {advice}"
            )
    parse = _parse_idx if name == "mnist" else _parse_cifar
    return {split: parse([raw[file][1] for file in files], facts.shape) for split, files in facts.files.items()}


def _find(name: str, facts: OfficialSet, raw_dir: Path, advice: str) -> dict[str, tuple[Path, bytes]]:
    """Returns for each raw file where it was found and its uncompressed bytes."""
    roots = [raw_dir, raw_dir / name]
    folders = [root / sub for root in roots for sub in ("", "cifar-10-batches-bin")]
    paths = {
        file: next((p for f in folders for p in (f / file, f / f"{file}.gz") if p.is_file()), None)
        for file in facts.sha256
    }
    missing = [file for file, path in paths.items() if path is None]
    if not missing:
        return {file: (path, _uncompressed(path, advice)) for file, path in paths.items() if path is not None}
    archive = next((root / facts.archive for root in roots if facts.archive and (root / facts.archive).is_file()), None)
    if archive is None:
        raise FileNotFoundError(f"{raw_dir} has no {', '.join(missing)} ({name}). {advice}")
    members = _unpacked(archive, set(facts.sha256), advice)
    if members.keys() != facts.sha256.keys():
        missing = sorted(facts.sha256.keys() - members.keys())
        raise ValueError(f"{archive} has no {', '.join(missing)}: it is not the official archive. {advice}")
    return members


def _uncompressed(path: Path, advice: str) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}). {advice}") from error


def _unpacked(archive: Path, wanted: set[str], advice: str) -> dict[str, tuple[Path, bytes]]:
    members = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:  # a stream: each byte is decompressed once, whatever the order
            for member in tar:
                file = Path(member.name).name
                content = tar.extractfile(member) if file in wanted else None
                if content is not None:
                    members[file] = (archive / member.name, content.read())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{archive} is not a whole tar.gz file ({error}). {advice}") from error
    return members


def _parse_idx(raw: list[bytes], shape: tuple[int, int, int]) -> Split:
    images, labels = raw
    (count,) = struct.unpack_from(">4xI", images)
    return Split(
        np.frombuffer(images, np.uint8, offset=16).reshape(count, *shape),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int32),
    )


def _parse_cifar(raw: list[bytes], shape: tuple[int, int, int]) -> Split:
    height, width, channels = shape
    # One record: the label, then the planes red, green, blue, each row by row.
    records = np.concatenate([np.frombuffer(part, np.uint8).reshape(-1, 1 + height * width * channels) for part in raw])
    planes = records[:, 1:].reshape(-1, channels, height, width)
    return Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int32))
