"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full
def test_the_example_of_the_attack_page(capsys):
    (example,) = re.findall(r"```python\n(import flax.*?)```", (ROOT / "docs" / "attacks.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 30
    # Fewer images: what is tested is that it runs, and that the three kinds of model are taken.
    exec(compile(example.replace(":64]", ":8]"), "docs/attacks.md", "exec"), {"__name__": "example"})
    said = capsys.readouterr().out.split("\n")
    assert sum(line.startswith("robust accuracy") for line in said) == 3
