"""The notebooks run from top to bottom, as they stand."""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.md"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_that_ends_with_an_exercise(path):
    text = path.read_text()
    assert text.startswith("---\njupytext:\n")
    assert text.count("```") == 2 * text.count("```{code-cell}\n")
    assert "**Exercise.**" in text.rsplit("```", 1)[1]
    assert f"({path.name})" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    "path",
    [path if path.stem.startswith("2") else pytest.param(path, marks=pytest.mark.full) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_it_runs(path, standard_promotion, capsys):
    mpl.use("agg")
    cells = re.findall(r"```\{code-cell\}\n(.*?)```", path.read_text(), re.DOTALL)
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), namespace)
    plt.close("all")
    assert len(cells) >= 5
    assert capsys.readouterr().out
