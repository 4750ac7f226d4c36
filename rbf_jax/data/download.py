"""Downloading the official raw files, checked and with a progress bar."""

import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rbf_jax.data.official import lookup
from rbf_jax.data.prepared import make_command

__all__ = ["download"]

_CONNECT_SECONDS = 5.0  # for one address of the server
_PROBE_SECONDS = 12.0  # for the first answer of the server, name lookup and all its addresses included
_STALL_SECONDS = 15.0  # without a byte, in the middle of a file


def download(name: str, raw_dir: str | Path) -> Path:
    """Downloads the official raw files of a data set, as they are (compressed), with a progress bar.

    A file that is there already with the right hash is kept, so a broken download goes on with the file it broke in.

    Args:
        name: "mnist" (11 MB) or "cifar10" (170 MB).
        raw_dir: the files go to `<raw_dir>/<name>/`, where `prepare` finds them.

    Returns:
        The folder with the files.

    Raises:
        ConnectionError: if the server cannot be reached or the transfer breaks; without network within 20 s.
        ValueError: if `name` is unknown or a downloaded file has another hash than the official one.
    """
    facts = lookup(name)
    import pooch
    import requests

    folder = Path(raw_dir).expanduser() / name
    http = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=(_CONNECT_SECONDS, _STALL_SECONDS))

    def probe_and_fetch(url, output_file, owner):
        _probe(url)
        http(url, output_file, owner)

    downloader: Any = probe_and_fetch  # pooch calls it as documented, not as its type says

    instead = (
        f"Put the official files in a folder and run `{make_command(None, raw=True)}`, or work with the embedded "
        "digits, which need no download: `make quickstart`."
    )
    for url, sha256 in facts.downloads.items():
        file = url.rsplit("/", 1)[1]
        try:
            pooch.retrieve(url, f"sha256:{sha256}", fname=file, path=folder, downloader=downloader)
        except requests.RequestException as error:
            raise ConnectionError(f"could not download {name} from {url} ({error}). {instead}") from error
        except ValueError as error:
            raise ValueError(f"{url} is not the official file ({error}). {instead}") from error
    return folder


def _probe(url: str) -> None:
    """Raises ConnectionError unless the server answers within `_PROBE_SECONDS`.

    The timeouts of requests hold for one address and not for the name lookup; a thread bounds everything together.
    """
    import requests

    errors: list[requests.RequestException] = []

    def ask():
        try:
            requests.head(url, timeout=_CONNECT_SECONDS, allow_redirects=True).close()
        except requests.RequestException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise requests.ConnectTimeout(f"{urlsplit(url).hostname} did not answer within {_PROBE_SECONDS:g} s")
