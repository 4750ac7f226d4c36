"""The command behind `make data`."""

import runpy
from pathlib import Path

import pytest

from rbf_jax.data import is_prepared
from rbf_jax.data.official import OFFICIAL

SCRIPT = Path(__file__).parents[2] / "experiments" / "prepare_data.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_it_says_what_it_does_and_does_it_once(main, name, raw_dir, tmp_path, capsys):
    arguments = ["--raw", str(raw_dir), "--data-dir", str(tmp_path / "data"), name]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{name}: will read {raw_dir}, then check it and write it to {tmp_path / 'data'}: about" in out
    assert is_prepared(name, tmp_path / "data")
    assert main(arguments) == 0
    assert "already prepared and complete" in capsys.readouterr().out


def test_without_raw_it_downloads_first(main, name, raw_dir, tmp_path, monkeypatch, capsys):
    def download(name, folder):
        assert folder == tmp_path / "data" / "downloads" / "rbf_jax"
        folder.mkdir(parents=True)
        raw_dir.rename(folder / name)

    monkeypatch.setitem(main.__globals__, "download", download)
    assert main(["--data-dir", str(tmp_path / "data"), name]) == 0
    assert f"{name}: will download" in capsys.readouterr().out
    assert is_prepared(name, tmp_path / "data")


@pytest.mark.parametrize("trouble", ["missing", "wrong", "offline", "unknown"])
@pytest.mark.parametrize("name", ["mnist"])
def test_refusals_are_one_message_and_code_2(main, name, raw_dir, tmp_path, monkeypatch, capsys, trouble):
    arguments = ["--raw", str(raw_dir), "--data-dir", str(tmp_path / "data"), name]
    if trouble == "missing":
        arguments[1] = str(tmp_path)
    elif trouble == "wrong":
        (raw_dir / "train-labels-idx1-ubyte.gz").rename(raw_dir / "train-images-idx3-ubyte.gz")
        (raw_dir / "train-labels-idx1-ubyte").write_bytes(b"nothing")
    elif trouble == "offline":
        downloads = {"http://127.0.0.1:9/x": "0" * 64}
        monkeypatch.setitem(OFFICIAL, name, OFFICIAL[name]._replace(downloads=downloads))
        arguments = arguments[2:]
    else:
        arguments[-1] = "svhn"
    assert main(arguments) == 2
    error = capsys.readouterr().err
    message = [line for line in error.splitlines() if line.startswith("prepare_data: ")]
    assert len(message) == 1
    assert error.endswith(message[0] + "\n")
    assert "make data" in message[0] or trouble == "unknown"
    assert not (tmp_path / "data" / name).exists()
