"""A grid of configurations, each a job of its own: filters, models, attacks, tables; and one table over all.

    python -m experiments.sweep --config=experiments/configs/mnist.py:cpu --grid=beta2=0,1,1.75 --grid=seed=0,1
    python -m experiments.sweep ... --only=3      # point 3 alone: for the jobs of an array, or machines of their own

A grid names fields of the configuration as `--config.NAME` would, and their values. Each point is what
`experiments.reproduce` computes in a folder of its own: a killed one goes on where it was, a finished one is not begun
again, and one that fails does not stop the others.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from experiments import jobs
from experiments.catalogue import ball
from experiments.paper_tables import Rows, Table, text
from experiments.recipes import RECIPES
from experiments.report import format_table
from experiments.results import column_title
from experiments.verdict import worst
from rbf_jax.files import read_json, replacing

GRID = flags.DEFINE_multi_string("grid", [], "NAME=VALUE,VALUE,...: a field of the configuration, and its values")
ONLY = flags.DEFINE_integer("only", None, "the number of one point, from 0: the others are not run")

Point = dict[str, str]


def points(config: Any, grid: list[str]) -> list[Point]:
    """All combinations of the values.

    Raises:
        ValueError: a field that the configuration does not have, or no values.
    """
    values: dict[str, list[str]] = {}
    for axis in grid:
        name, _, listed = axis.partition("=")
        found = config
        for part in name.split("."):
            allowed = list(found.keys()) if hasattr(found, "keys") else []
            if part not in allowed:
                raise ValueError(
                    f"--grid must name a field of the configuration, one of {', '.join(allowed)}, got {name!r}"
                )
            found = found[part]
        values[name] = [value for value in listed.split(",") if value]
        if not values[name]:
            raise ValueError(f"--grid must be NAME=VALUE,VALUE,..., got {axis!r}")
    return [dict(zip(values, combined, strict=True)) for combined in itertools.product(*values.values())]


def folder_of(directory: Path, point: Point) -> Path:
    """The run directory of a point."""
    return directory / ("_".join(f"{name}={value}" for name, value in point.items()) or "one")


def configuration() -> list[str]:
    """The flags that say which configuration is varied."""
    flag = flags.FLAGS["config"]
    file, changed = config_flags.get_config_filename(flag), config_flags.get_override_values(flag)
    if ":" not in file:
        # Choosing it by device would take the device's memory from the points.
        raise ValueError(f"--config must name the profile, {file}:PROFILE")
    return [f"--config={file}", *(f"--config.{name}={value}" for name, value in changed.items())]


def is_finished(folder: Path, point: Point, config: list[str]) -> bool:
    """Whether this point of this configuration has run to its end there."""
    path = folder / "point.json"
    return path.exists() and read_json(path, f"Remove {path}") == {"config": config, "point": point}


def run_point(folder: Path, point: Point, config: list[str]) -> bool:
    """Runs a point to its end, in a process of its own; whether it got there."""
    command = [sys.executable, "-m", "experiments.reproduce", *config, f"--workdir={folder}"]
    command += [f"--config.{name}={value}" for name, value in point.items()]
    command += [f"--data_dir={jobs.DATA_DIR.value}"] if jobs.DATA_DIR.value else []
    command += [f"--filters={jobs.FILTERS.value}"] if jobs.FILTERS.value else []
    if subprocess.run(command, check=False).returncode:
        return False
    with replacing(folder / "point.json") as temporary:
        temporary.write_text(json.dumps({"config": config, "point": point}) + "\n")
    return True


def summary(found: list[tuple[Point, list[dict[str, Any]]]]) -> Table:
    """A line for each point: clean accuracy of each model, and its worst case in each budget."""
    columns: dict[str, None] = {}
    lines = []
    for point, results in found:
        rows, line = Rows(results), dict(point)
        budgets = dict.fromkeys((row["norm"], row["epsilon"]) for row in results if row["norm"])
        for model in rows.models():
            for form in RECIPES[model].scored_on:
                title = column_title(model, form)
                line[f"{title}: clean"] = text(rows.find(model, "clean", "", 0.0, form))
                for norm, epsilon in budgets:
                    line[f"{title}: worst in {ball(norm, epsilon)}"] = text(worst(rows, model, form, norm, epsilon))
        columns |= dict.fromkeys(line)
        lines.append(line)
    return list(columns), [{name: line.get(name, "") for name in columns} for line in lines]


def job() -> None:
    """Runs what is not finished; writes the summary."""
    if jobs.DISTRIBUTED.value or jobs.PUBLISH.value:
        raise ValueError("a sweep takes neither --distributed nor --publish: its points are jobs of their own (--only)")
    config = configuration()
    everything = points(jobs.CONFIG.value, GRID.value)
    if ONLY.value is not None and not 0 <= ONLY.value < len(everything):
        raise ValueError(f"--only must be from 0 to {len(everything) - 1}, got {ONLY.value}")
    directory = jobs.run_directory(f"sweep-{jobs.CONFIG.value.set}-{jobs.CONFIG.value.profile}")
    chosen = everything if ONLY.value is None else [everything[ONLY.value]]
    todo = [point for point in chosen if not is_finished(folder_of(directory, point), point, config)]
    print(f"{len(everything)} points in {directory}; to run: {len(todo)}", flush=True)
    failed = [point for point in tqdm(todo, desc="points") if not run_point(folder_of(directory, point), point, config)]
    found = [
        (point, read_json(folder / "results.json", f"Remove {folder}")["rows"])
        for point in everything
        if is_finished(folder := folder_of(directory, point), point, config)
    ]
    headings, lines = summary(found)
    page = f"{len(found)} of {len(everything)} points. Accuracy in percent, 95 % interval.\n\n"
    page += format_table(headings, lines) if lines else ""
    with replacing(directory / "summary.md") as temporary:
        temporary.write_text(page + "\n")
    print(f"\n{page}\n\nsummary: {directory / 'summary.md'}")
    if failed:
        raise ValueError(f"{len(failed)} points failed, begin with {folder_of(directory, failed[0])}; the others stand")


if __name__ == "__main__":
    jobs.main(job, computes=False)
