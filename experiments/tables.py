"""Makes the tables of ``results/`` from its JSON: `make tables`. Nothing in them is written by hand.

``results/NAME/results.json`` (published by ``experiments.reproduce --publish``) gives ``results/NAME/table.md``,
``results/benchmarks/*.json`` give ``results/benchmarks/table.md``.
"""

import json
from pathlib import Path
from typing import Any

from experiments.pipeline import Row
from experiments.provenance import ROOT
from experiments.report import format_table
from experiments.reproduce import COLUMNS, table
from rbf_jax.files import replacing


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


def accuracy_table(record: dict[str, Any]) -> str:
    """Markdown of one published run."""
    fields = Row._fields
    rows = [Row(**{name: row[name] for name in fields}) for row in record["rows"]]
    head = f"{_origin(record)}, seed {record['config']['seed']}, {record['seconds']} s, {record['filters']} filters."
    return f"{record['note']}\n\n{head}\n\n{format_table(COLUMNS, table(rows))}\n"


def benchmark_table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown of all benchmarks."""
    origin = ("commit", "device", "cores", "jax")
    parts = []
    for name, record in records.items():
        figures = {key: value for key, value in record.items() if key not in origin}
        parts.append(f"## {name}\n\n{_origin(record)}.\n\n{format_table(('figure', 'value'), _flat(figures))}\n")
    return "\n".join(parts)


def main(results: Path = ROOT / "results") -> None:
    """Writes every table; prints which."""
    texts = {
        path.parent / "table.md": accuracy_table(json.loads(path.read_text()))
        for path in sorted(results.glob("*/results.json"))
    }
    benchmarks = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("benchmarks/*.json"))}
    if benchmarks:
        texts[results / "benchmarks" / "table.md"] = benchmark_table(benchmarks)
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text)
        print(path)


if __name__ == "__main__":
    main()
