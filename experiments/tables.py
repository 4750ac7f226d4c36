"""Makes the tables of ``results/``: `make tables`. Nothing in them is written by hand.

What ``experiments.reproduce --publish`` put into ``results/SET/`` (profile ``gpu``) or ``results/SET-PROFILE/`` gives
its ``results.json``, ``README.md`` and ``VERDICT.md``, from ``job.json``, ``models/*.json``, ``ledger/``,
``certificates/`` and ``studies/``; the ledgers of ``results/arena_MODEL`` and ``results/robust_net`` give their pages;
``results/benchmarks/*.json`` give ``results/benchmarks/README.md``; the table at the top of the README is made too.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import certification, contests, pages, paper_tables, results, studies, verdict
from experiments.provenance import ROOT
from experiments.report import format_table
from rbf_jax import evaluate
from rbf_jax.files import read_json, replacing

_WAY_OUT = "Publish it again"


def _origin(record: dict[str, Any]) -> str:
    return f"Commit {record['commit']}, {record['device']}, {record['cores']} cores, jax {record['jax']}"


def _flat(record: dict[str, Any], prefix: str = "") -> list[dict[str, str]]:
    """Nested figures as rows of (figure, value)."""
    rows = []
    for name, value in record.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}: ")
        else:
            rows.append(
                {"figure": f"{prefix}{name}", "value": f"{value:.4g}" if isinstance(value, float) else str(value)}
            )
    return rows


class Written(NamedTuple):
    """What was written of a data set: its tables, what their numbers are, and where they come from."""

    sections: list[pages.Section]
    note: str
    origin: str


def write_results(directory: Path, files: Sequence[Path] | None = None) -> Written:
    """Writes ``results.json`` and ``README.md`` of a folder, and ``VERDICT.md`` where the paper has the set.

    Args:
        directory: with ``job.json``, ``models/``, ``ledger/``, and ``certificates/``, ``studies/`` and ``figures/``
            where they are.
        files: the ledgers, certificates and studies that count; None for all in the folder.
    """

    def of(folder: str) -> list[Path]:
        found = directory.glob(f"{folder}/[!.]*.*") if files is None else files
        kinds = (path for path in found if path.parent.name == folder and path.suffix in (".npz", ".json"))
        return sorted(kinds, key=lambda path: path.name)

    job = read_json(directory / "job.json", _WAY_OUT)
    data_set = job["config"]["set"]
    recipes = {path.stem: read_json(path, _WAY_OUT) for path in sorted(directory.glob("models/[!.]*.json"))}
    unions = job["config"]["attack"]["unions"]
    outcomes = [evaluate.load_outcomes(path) for path in of("ledger")]
    rows = results.make_rows(data_set, outcomes, unions, job["config"]["beta2"])
    records = [certification.load(path) for path in of("certificates")]
    radii, beta2 = job["config"]["certify"]["radii"], job["config"]["beta2"]
    certificates = certification.make_rows(records, data_set, radii, beta2)
    studied = {path.stem: read_json(path, _WAY_OUT) for path in of("studies")}
    of_studies = [
        pages.Section(studies.STUDIES[name].title, studies.STUDIES[name].note, studies.table(name, record))
        for name, record in studied.items()
    ]
    more = list(of_studies)
    if certificates:
        table = certification.table(certificates)
        more.insert(0, pages.Section("Table VI: Certified accuracy", certification.NOTE, table))
    found = pages.sections(job, recipes, rows, more)
    record = job | {"models": recipes, "rows": rows, "certificates": certificates, "studies": studied}
    _write(directory / "results.json", json.dumps(record, indent=1) + "\n")
    drawn = directory / "figures" / "figures.json"
    figures = read_json(drawn, _WAY_OUT) if drawn.exists() else []
    _write(directory / "README.md", pages.page(job, found, rows, figures))
    if data_set in results.PAPER["settings"]["linf_eps"]:
        said = verdict.commentary(directory)
        _write(directory / "VERDICT.md", verdict.page(job, recipes, rows, outcomes, certificates, of_studies, said))
    return Written(found, pages.note(job["config"]), pages.origin(job, rows))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def benchmark_table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown of all benchmarks."""
    origin = ("commit", "device", "cores", "jax")
    parts = []
    for name, record in records.items():
        figures = {key: value for key, value in record.items() if key not in origin}
        parts.append(f"## {name}\n\n{_origin(record)}.\n\n{format_table(('figure', 'value'), _flat(figures))}\n")
    return "\n".join(parts)


_HEADLINE = re.compile(r"(?<=<!-- made by `make tables` -->\n).*?(?=<!-- end -->)", re.DOTALL)


def write_headline(readme: Path, folder: Path) -> None:
    """Puts the worst cases of each data set of the paper between the marks in the README."""
    parts = []
    for data_set, epsilon in results.PAPER["settings"]["linf_eps"].items():
        path = folder / data_set / "results.json"
        if path.exists():
            record = read_json(path, _WAY_OUT)
            table = format_table(
                *verdict.headline(data_set, paper_tables.Rows(record["rows"], record["config"]["beta2"]))
            )
            parts.append(f"{record['config']['title']}, linf {epsilon:g}, accuracy in percent:\n\n{table}\n")
    before = readme.read_text()
    _write(readme, _HEADLINE.sub(lambda _: "\n" + "\n".join(parts) + "\n", before))


def main(folder: Path = ROOT / "results") -> None:
    """Writes every table; prints which."""
    for job in sorted(folder.glob("*/job.json")):
        write_results(job.parent)
        print(job.parent / "README.md")
    for settings in sorted(folder.glob("*/settings.json")):
        _write(settings.parent / "README.md", contests.page(settings.parent))
        print(settings.parent / "README.md")
    readme = folder.parent / "README.md"
    if readme.exists():
        write_headline(readme, folder)
        print(readme)
    benchmarks = {path.stem: read_json(path, _WAY_OUT) for path in sorted(folder.glob("benchmarks/[!.]*.json"))}
    if benchmarks:
        path = folder / "benchmarks" / "README.md"
        _write(path, benchmark_table(benchmarks))
        print(path)


if __name__ == "__main__":
    main()
