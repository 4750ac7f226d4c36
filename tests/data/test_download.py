"""Downloading, from a server on this machine and from none."""

import functools
import hashlib
import http.server
import socket
import threading
import time

import pytest

from rbf_jax.data import download, load, prepare
from rbf_jax.data.download import _probe
from rbf_jax.data.official import OFFICIAL


@pytest.fixture
def address(raw_dir, monkeypatch):
    """Serves `raw_dir` and makes it the official address of the files in it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=raw_dir)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def publish(monkeypatch, name, downloads):
    monkeypatch.setitem(OFFICIAL, name, OFFICIAL[name]._replace(downloads=downloads))


def test_downloaded_files_can_be_prepared(name, arrays, raw_dir, address, monkeypatch, tmp_path):
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in raw_dir.iterdir()}
    publish(monkeypatch, name, {f"{address}/{file}": sums[file] for file in sums})
    folder = download(name, tmp_path / "downloads")
    assert {path.name for path in folder.iterdir()} == set(sums)
    prepare(name, tmp_path / "downloads", tmp_path / "data")
    assert load(name, "test", tmp_path / "data").labels.tolist() == arrays["test"].labels.tolist()
    # Files that are there need no network: nothing listens on port 9 of this machine.
    publish(monkeypatch, name, {f"http://127.0.0.1:9/{file}": sums[file] for file in sums})
    assert download(name, tmp_path / "downloads") == folder


@pytest.mark.parametrize("name", ["mnist"])
def test_another_file_is_refused(name, address, raw_dir, monkeypatch, tmp_path):
    file = "t10k-labels-idx1-ubyte.gz"
    publish(monkeypatch, name, {f"{address}/{file}": "0" * 64})
    with pytest.raises(ValueError, match=f"{address}/{file} is not the official file.*{'0' * 64}") as caught:
        download(name, tmp_path)
    assert hashlib.sha256((raw_dir / file).read_bytes()).hexdigest() in str(caught.value)
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize("name", ["mnist"])
@pytest.mark.parametrize("trouble", ["refused", "no such file", "silent"])
def test_trouble_ends_soon_and_says_what_to_do(name, address, monkeypatch, tmp_path, trouble):
    monkeypatch.setitem(_probe.__globals__, "_PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        url = {
            "refused": "http://127.0.0.1:9/x",
            "no such file": f"{address}/x",
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}/x",
        }[trouble]
        publish(monkeypatch, name, {url: "0" * 64})
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"could not download mnist .*`make data RAW=.*`make quickstart`"):
            download(name, tmp_path)
        assert time.monotonic() - start < 3


def test_the_first_contact_is_bounded_as_a_whole(monkeypatch):
    # A name lookup knows no timeout: only the thread ends it.
    monkeypatch.setitem(_probe.__globals__, "_PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(2) or [])
    start = time.monotonic()
    with pytest.raises(OSError, match=r"nowhere.invalid did not answer within 0.2 s"):
        _probe("https://nowhere.invalid/x")
    assert time.monotonic() - start < 1


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'svhn'"):
        download("svhn", tmp_path)


def test_every_official_file_can_be_downloaded():
    for name, facts in OFFICIAL.items():
        found = {url.rsplit("/", 1)[1] for url in facts.downloads}
        assert found == ({facts.archive} if facts.archive else {f"{file}.gz" for file in facts.sha256}), name
        assert set(facts.sha256) == {file for files in facts.files.values() for file in files}
        assert all(len(value) == 64 for value in (*facts.sha256.values(), *facts.downloads.values()))
