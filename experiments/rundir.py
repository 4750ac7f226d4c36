"""The run directory: what a job was asked to do, what it did, and where it goes on when it was killed."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

import rbf_jax
from rbf_jax.files import append_line, read_json, replacing

MAY_CHANGE = ("models", "epochs", "attack", "certify", "studies")

Config = Any
"""An ml_collections.ConfigDict, whose attributes have no static types."""


class Run(NamedTuple):
    """A job's folder, and its configuration."""

    directory: Path
    config: Config

    def log(self, record: dict[str, Any]) -> None:
        """Adds a line to ``log.jsonl``, with the time. A stage that was killed and went on may appear twice."""
        if jax.process_index() > 0:  # one of several processes says it
            return
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | record)
        append_line(self.directory / "log.jsonl", line)

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``log.jsonl``, none where it is missing; one that a kill cut short is left out."""
        path, found = self.directory / "log.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def overheads(self) -> dict[str, float]:
        """Seconds that came before trainings: ``"filters"`` of the EM, ``"bank MODEL"`` of its noise bank.

        Where the log has none, those that a finished model's record says.
        """
        found = dict[str, float]()
        for path in sorted((self.directory / "models").glob("[!.]*.json")):
            found |= read_json(path, "Remove it: it is written again").get("overheads", {})
        for record in self.records():
            if record.get("stage") == "filters" and record["kind"] == "own":
                found["filters"] = record["seconds"]
            elif record.get("stage") == "bank":
                found[f"bank {record['model']}"] = record["seconds"]
        return found


def learned(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration determines what is learned; by way of JSON, as it is compared with what is read back."""
    return json.loads(json.dumps({name: value for name, value in config.items() if name not in MAY_CHANGE}))


def open_run(directory: Path, config: Config) -> Run:
    """Opens a run directory, or makes it.

    What is learned is determined by the configuration without what is evaluated and without ``models`` and ``epochs``:
    these may change, as each ledger says itself of which attack it is, and each model how long it was trained.

    Raises:
        ValueError: the directory was begun with another configuration, or its ``config.json`` is damaged.
    """
    path = directory / "config.json"
    wanted = {"version": rbf_jax.__version__, "config": learned(config.to_dict())}
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n")
        return Run(directory, config)
    way_out = f"Name another folder (WORKDIR=...), or remove {directory} to begin anew."
    found = read_json(path, way_out)
    before, now = _flat(found), _flat(wanted)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(f"{path} has {name} = {before.get(name)!r}, not {now.get(name)!r}. {way_out}")
    return Run(directory, config)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}.{key}".strip(".")).items()
    }
