"""Filters, models, attacks, tables and a report of one configuration: everything that is not yet in its run directory.

    python -m experiments.reproduce --config=experiments/configs/quickstart.py:smoke [--config.train.epochs=3]

The same command goes on where a stopped one was, at any moment, and ends with the same numbers. Exit code 2 with one
message where something is wrong: data missing, a damaged file, another configuration in the run directory, a full disk.
"""

import json
import time
from pathlib import Path

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

from experiments import certification, cost, evaluation, figures, jobs, learn, rundir, studies, tables
from experiments.catalogue import cells
from experiments.provenance import ROOT, provenance, published_as
from experiments.recipes import RECIPES
from experiments.report import format_table, write_report
from rbf_jax.files import read_json, replacing


def _without_filters(run: rundir.Run) -> list[Path]:
    """Takes out the models whose filters are not there.

    Returns:
        The committed ledgers of what was found with them; none where the configuration learns something else.
    """
    config, missing = run.config, []
    for name in config.models:
        kind = RECIPES[name].filters
        if RECIPES[name].defended and kind == "released" and not learn.filters_path(run, kind).exists():
            missing.append(name)
    published = ROOT / "results" / published_as(config)
    job, ledgers = published / "job.json", []
    if job.exists() and rundir.learned(read_json(job, "Publish it again")["config"]) == rundir.learned(
        config.to_dict()
    ):
        ledgers = [path for path in sorted(published.glob("ledger/[!.]*.npz")) if path.name.split("-")[0] in missing]
    stands = "its committed result stands" if ledgers else "there is no committed result of this configuration"
    for name in missing:
        print(f"{name} is not run again, {stands}: no released filters here (FILTERS=path.npz)")
    config.models = tuple(name for name in config.models if name not in missing)
    return ledgers


def job() -> None:
    """Runs it all; prints the table and the report's path."""
    began = time.perf_counter()
    run = jobs.open_run()
    config = run.config
    examples = learn.load(config, jobs.DATA_DIR.value)
    committed = _without_filters(run)
    speed = cost.speeds(run, examples)
    stages = cost.training(run, examples, config.models, speed) + cost.attacking(run, speed)
    stages += cost.certifying(run, speed) + studies.studying(run, speed)
    where = f"on {provenance()['device']}, in {run.directory}"
    print(f"{config.title}, profile {config.profile} {where}\n{cost.say(stages)}", flush=True)

    filters, models, ledger = learn.fit_filters(run, examples), {}, []
    for name in config.models:
        variables = learn.train_model(run, examples, name)
        models[name] = learn.forms(config, learn.filters_of(run, examples, name), name, variables)
    for cell in jobs.giving_back(cells(config), 20):
        ledger += evaluation.evaluate_cell(run, examples.test, cell, models)
    more = certification.certify_all(run, examples.test, models)
    for name in jobs.giving_back(studies.wanted(config), 1):
        studies.study(name, run, examples, filters, models)
        more.append(studies.study_path(run, name))

    record = provenance() | {"config": config.to_dict(), "filters": len(filters.variances), "seconds": run.overheads()}
    with replacing(run.directory / "job.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    drawn = figures.sections(run, examples.test, filters, models)
    pictures = figures.save(run.directory / "figures", drawn)
    written = tables.write_results(run.directory, ledger + committed + more)
    if jobs.PUBLISH.value:
        files = [*ledger, *more, *pictures, learn.filters_path(run), run.directory / "job.json"]
        jobs.publish(run, config.models, files)
    report = run.directory / "report.html"
    write_report(
        report,
        title=config.title,
        summary=f"{written.note}\n\n{written.origin}",
        tables=[(section.heading, section.text, section.table[1]) for section in written.sections],
        sections=drawn,
    )
    seconds = time.perf_counter() - began
    headings, lines = written.sections[0].table
    print(f"\n{format_table(headings, lines)}\n\n{written.note}\n\nreport: {report}  ({seconds:.0f} s)")


if __name__ == "__main__":
    jobs.main(job)
