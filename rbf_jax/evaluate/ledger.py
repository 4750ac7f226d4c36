"""The ledger of an evaluation: which example survived which attack under which redraw of the defence's noise.

Work is kept by batches while it runs, so that a killed evaluation goes on where it was; what comes out is a file for
each attacked model, its outcomes packed into bits.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rbf_jax.files import as_path, read_json, read_npz, replacing, write_npz


class Outcomes(NamedTuple):
    """How the examples fared.

    Attributes:
        rows: int64 ``(N,)``, their indices in the data set.
        selection: bool ``(S, N)``, where the prediction was right, on the redraws that pick an example's worst attack.
        scoring: bool ``(R, N)``, the same on the redraws that score it; a deterministic model has one.
        facts: how they came about; JSON values.
    """

    rows: np.ndarray
    selection: np.ndarray
    scoring: np.ndarray
    facts: dict[str, Any]


class Parts(NamedTuple):
    """Where the finished batches of one computation are kept, so that a run that was stopped goes on.

    Attributes:
        directory: the folder, made where it is missing.
        facts: what else the computation is; JSON values. Batches of other facts, other arrays, another attack or
            another model are refused.
    """

    directory: Path
    facts: dict[str, Any]

    def open(self, inputs: str, batch_size: int) -> None:
        """Makes the folder, or checks it.

        Args:
            inputs: fingerprint of all that the computation depends on.
            batch_size: examples in a batch.

        Raises:
            ValueError: the folder holds batches of another computation.
        """
        path = as_path(self.directory) / "inputs.json"
        wanted = json.loads(json.dumps({"facts": self.facts, "arrays": inputs, "batch_size": batch_size}))
        if not path.exists():
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(wanted))
            return
        way_out = f"Remove {self.directory} to compute it again, or name another folder (WORKDIR)"
        found = read_json(path, way_out)
        if found != wanted:
            names = {"facts": "facts", "arrays": "attack, weights or images", "batch_size": "batch size"}
            said = found if isinstance(found, dict) else {}
            others = " and ".join(title for name, title in names.items() if said.get(name) != wanted[name])
            raise ValueError(f"{self.directory} holds another computation: of other {others}. {way_out}")

    def kept(self, start: int, compute: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """Reads the batch that begins at ``start``, or computes and keeps it.

        Raises:
            ValueError: the batch's file is damaged.
        """
        path = as_path(self.directory) / f"{start:06d}.npz"
        if path.exists():
            way_out = "Remove it, and this batch is computed again"
            stored = read_npz(path, "a batch of results", way_out)
            arrays = tuple(stored[name] for name in sorted(stored) if name.startswith("array"))
            # A damaged zip directory hides what comes behind it.
            if stored.get("count") != len(arrays):
                raise ValueError(f"{path} is not a batch of results, or damaged: arrays are missing. {way_out}")
            return arrays
        began = time.perf_counter()
        arrays = compute()
        named: dict[str, Any] = {f"array{i:02d}": array for i, array in enumerate(arrays)}
        write_npz(path, {"seconds": time.perf_counter() - began, "count": len(arrays)} | named)
        return arrays

    def seconds(self) -> float:
        """What the kept batches took, in whichever process."""
        total = 0.0
        for path in as_path(self.directory).glob("[0-9]*.npz"):
            with path.open("rb") as file, np.load(file) as stored:
                total += float(stored["seconds"])
        return total


def save_outcomes(path: str | Path, outcomes: Outcomes) -> None:
    """Writes outcomes as ``.npz``, eight to a byte; of the rows the steps, as those of a whole data set compress.

    Raises:
        ValueError: outcomes of another number of examples than the rows.
        OSError: the file cannot be written.
    """
    for name in ("selection", "scoring"):
        if (shape := np.shape(getattr(outcomes, name)))[1:] != np.shape(outcomes.rows):
            raise ValueError(f"{name} must be (redraws, {len(outcomes.rows)}), as there are so many rows, got {shape}")
    arrays = {
        "steps": np.diff(outcomes.rows, prepend=0).astype(np.int32),
        "selection": np.packbits(outcomes.selection, axis=-1),
        "scoring": np.packbits(outcomes.scoring, axis=-1),
        "facts": np.array(json.dumps(outcomes.facts)),
    }
    write_npz(path, arrays, compressed=True)


def load_outcomes(path: str | Path) -> Outcomes:
    """Reads what `save_outcomes` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or something else.
    """
    way_out = "Name another file, or remove it where it is to be computed again"
    stored = read_npz(path, "a ledger", way_out)
    try:
        rows = np.cumsum(stored["steps"], dtype=np.int64)
        selection, scoring = (
            np.unpackbits(stored[name], axis=-1, count=len(rows)).astype(bool) for name in ("selection", "scoring")
        )
        return Outcomes(rows, selection, scoring, json.loads(str(stored["facts"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a ledger: {error}. {way_out}") from error


def worst_case(selection: np.ndarray, scoring: np.ndarray) -> np.ndarray:
    """Which examples survive their worst attack.

    For each example the attack that leaves it right least often on the selection redraws (of equals the one that leaves
    the fewest of all examples, then the first) is scored on the scoring redraws: fresh ones, or the least of several
    noisy scores would be too low. A deterministic model's one outcome also selects.

    Args:
        selection: bool ``(attacks, S, N)``; S may be 0 where R is 1.
        scoring: bool ``(attacks, R, N)``.

    Returns:
        bool ``(R, N)``.

    Raises:
        ValueError: several redraws to score on, and none to select on; other attacks or examples on either.
    """
    if (selection.shape[0], selection.shape[2]) != (scoring.shape[0], scoring.shape[2]):
        raise ValueError(
            f"scoring must be of the attacks and examples of selection {selection.shape}, got {scoring.shape}"
        )
    if not selection.shape[1]:
        if scoring.shape[1] != 1:
            raise ValueError(f"selection must hold redraws where scoring holds {scoring.shape[1]}, got none")
        selection = scoring
    strongest = np.argsort(selection.mean((1, 2)), kind="stable")
    worst = strongest[selection[strongest].mean(1).argmin(0)]
    return scoring[worst, :, np.arange(len(worst))].T
