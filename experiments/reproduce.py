"""Filters, models, attacks, tables and a report of one configuration: everything that is not yet in its run directory.

    python -m experiments.reproduce --config=experiments/configs/quickstart.py:smoke [--config.train.epochs=3]

The same command goes on where a stopped one was, at any moment, and ends with the same numbers. Exit code 2 with one
message where something is wrong: data missing, a damaged file, another configuration in the run directory, a full disk.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from experiments import process

if __name__ == "__main__":
    process.ensure()

import jax
from absl import flags

from experiments import cost, evaluation, figures, jobs, learn, results, tables
from experiments.provenance import ROOT, provenance
from experiments.report import format_table, write_report
from experiments.rundir import Run
from rbf_jax import train
from rbf_jax.files import replacing

PUBLISH = flags.DEFINE_bool("publish", False, "also write ledger, weights and tables into results/ of the checkout")


def job() -> None:
    """Runs it all; prints the table and the report's path."""
    began = time.perf_counter()
    run = jobs.open_run()
    config = run.config
    examples = learn.load(config, jobs.DATA_DIR.value)
    speed = cost.speeds(run, examples)
    stages = cost.training(run, examples, config.models, speed) + cost.attacking(run, speed)
    print(f"{config.title}, profile {config.profile}, in {run.directory}\n{cost.say(stages)}", flush=True)

    filters = learn.fit_filters(run, examples)
    forms = {
        name: learn.forms(config, filters, name, learn.train_model(run, examples, filters, name))
        for name in config.models
    }
    for cell in evaluation.cells(config):
        evaluation.evaluate_cell(run, examples.test, cell, forms[cell.model])

    record = describe(run, len(filters.variances))
    with replacing(run.directory / "job.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    rows = tables.write_results(run.directory, config.set)
    if PUBLISH.value:
        publish(run)
    headings, lines = results.table(rows)
    report = run.directory / "report.html"
    write_report(
        report,
        title=config.title,
        summary=f"{results.note(record['config'])} Computed on {jax.devices()[0].device_kind}.",
        table=lines,
        sections=figures.sections(run, examples.test, filters, forms),
    )
    seconds = time.perf_counter() - began
    print(
        f"\n{format_table(headings, lines)}\n\n{results.note(record['config'])}\n\nreport: {report}  ({seconds:.0f} s)"
    )


def describe(run: Run, filters: int) -> dict[str, Any]:
    """What the tables need besides the ledger: the configuration, and how the models were trained."""
    recipes = {name: train.load_weights(learn.weights_path(run, name))[1] for name in run.config.models}
    for recipe in recipes.values():
        del recipe["config"]  # that of the job
    config = json.loads(json.dumps(run.config.to_dict()))
    return provenance() | {"config": config, "filters": filters, "models": recipes}


def publish(run: Run) -> None:
    """Copies what lasts into ``results/SET/``: ledger, filters, weights, job; then the tables."""
    directory = ROOT / "results" / run.config.set
    wanted = [Path("filters.npz")]
    wanted += [path.relative_to(run.directory) for path in sorted(run.directory.glob("ledger/[!.]*.npz"))]
    if run.config.network == "cnn":  # VGG-16's weights are too large for a repository
        wanted += [Path("models") / f"{name}.npz" for name in run.config.models]
    # The ledger of a run before, with other attacks or weights, must not mix with this one.
    for path in directory.glob("ledger/*.npz"):
        if path.relative_to(directory) not in wanted:
            path.unlink()
    for path in [*wanted, Path("job.json")]:
        with replacing(directory / path) as temporary:
            shutil.copyfile(run.directory / path, temporary)
    tables.write_results(directory, run.config.set)


if __name__ == "__main__":
    jobs.main(job)
