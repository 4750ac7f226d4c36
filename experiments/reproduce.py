"""Filters, models, attacks, tables and a report of one configuration: everything that is not yet in its run directory.

    python -m experiments.reproduce --config=experiments/configs/quickstart.py:smoke [--config.train.epochs=3]

The same command goes on where a stopped one was, at any moment, and ends with the same numbers. Exit code 2 with one
message where something is wrong: data missing, a damaged file, another configuration in the run directory, a full disk.
"""

import json
import time

from experiments import process

if __name__ == "__main__":
    process.ensure()

import jax

from experiments import cost, evaluation, figures, jobs, learn, results, tables
from experiments.provenance import provenance
from experiments.report import format_table, write_report
from rbf_jax.files import replacing


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
    ledger = []
    for cell in evaluation.cells(config):
        evaluation.evaluate_cell(run, examples.test, cell, forms[cell.model])
        ledger += [evaluation.outcome_path(run, cell, form) for form in cell.scored_on]

    record = provenance() | {"config": config.to_dict(), "filters": len(filters.variances)}
    with replacing(run.directory / "job.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    rows = tables.write_results(run.directory, config.set, ledger)
    if jobs.PUBLISH.value:
        jobs.publish(run, config.models, [*ledger, run.directory / "filters.npz", run.directory / "job.json"])
    (headings, lines), note = results.table(rows), results.note(config.to_dict())
    report = run.directory / "report.html"
    write_report(
        report,
        title=config.title,
        summary=f"{note} Computed on {jax.devices()[0].device_kind}.",
        table=lines,
        sections=figures.sections(run, examples.test, filters, forms),
    )
    seconds = time.perf_counter() - began
    print(f"\n{format_table(headings, lines)}\n\n{note}\n\nreport: {report}  ({seconds:.0f} s)")


if __name__ == "__main__":
    jobs.main(job)
