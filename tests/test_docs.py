"""The examples of the documentation run as they stand."""

import inspect
import re
from pathlib import Path

import pytest

import rbf_jax

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: (\S+)", pages))
    packages = [rbf_jax, *(value for value in vars(rbf_jax).values() if inspect.ismodule(value))]
    found = {value for package in packages for value in vars(package).values() if callable(value)}
    homes = {value.__module__ for value in found if getattr(value, "__module__", "").startswith("rbf_jax")}
    assert homes - documented == set()
    assert len(homes) > 30


@pytest.mark.full
def test_the_example_of_the_attack_page(capsys):
    (example,) = re.findall(r"```python\n(import flax.*?)```", (ROOT / "docs" / "attacks.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 30
    # Fewer images: what is tested is that it runs, and that the three kinds of model are taken.
    exec(compile(example.replace(":64]", ":8]"), "docs/attacks.md", "exec"), {"__name__": "example"})
    said = capsys.readouterr().out.split("\n")
    assert sum(line.startswith("robust accuracy") for line in said) == 3
