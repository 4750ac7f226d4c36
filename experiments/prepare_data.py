"""Prepares MNIST and CIFAR-10 for `rbf_jax.data.load`: `make data [RAW=dir] [DATA_DIR=dir]`.

With --raw the official raw files are taken from that folder; without it they are downloaded first. What is prepared
already is left alone. Exit code 2 with one message where the data cannot be had or is not the official data.
"""

import argparse
import sys
from pathlib import Path

from rbf_jax.data import default_data_dir, download, is_prepared, prepare
from rbf_jax.data.prepared import check_local
from rbf_jax.files import as_path

# Measured on two CPU cores.
_DOWNLOAD = {"mnist": "11 MB", "cifar10": "170 MB"}
_SECONDS = {"mnist": 10, "cifar10": 20}


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0, or 2 where a data set was refused.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="folder with the official raw files; default: download them")
    parser.add_argument("--data-dir", help="folder of tensorflow-datasets (default: its own)")
    parser.add_argument("names", nargs="*", metavar="name", help="mnist, cifar10 (default: both)")
    args = parser.parse_args(argv)
    try:
        for name in args.names or ["mnist", "cifar10"]:
            _prepare(name, args.raw, args.data_dir)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(name: str, raw: Path | None, data_dir: str | None) -> None:
    place = as_path(data_dir or default_data_dir())
    if is_prepared(name, data_dir):
        print(f"{name}: already prepared and complete in {place}, nothing to do")
        return
    check_local(data_dir)
    first = f"read {raw}" if raw else f"download {_DOWNLOAD[name]}"
    then = f"check it and write it to {place}: about {_SECONDS[name]} s"
    print(f"{name}: will {first}, then {then}{'' if raw else ' after the download'}", flush=True)
    if raw is None:
        raw = place / "downloads" / "rbf_jax"
        download(name, raw)
    prepare(name, raw, data_dir)
    print(f"{name}: prepared in {place}")


if __name__ == "__main__":
    sys.exit(main())
