"""The examples of the documentation run as they stand."""

import inspect
import re
from pathlib import Path

import flax.linen as nn
import jax
import pytest

import rbf_jax
from rbf_jax.data import as_float, load_embedded

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


@pytest.mark.full
def test_the_example_of_your_own_model(capsys):
    (example,) = re.findall(
        r"```python\n(import jax\nfrom jax.tree_util.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])
    digits = load_embedded()["test"]
    images, labels = as_float(digits.images[:8]), digits.labels[:8]
    given = {
        "model": model,
        "params": model.init(jax.random.key(0), images)["params"],
        "images": images,
        "labels": labels,
    }
    exec(compile(example, "README.md", "exec"), given | {"__name__": "example"})
    clean, robust, low, high = map(float, re.findall(r"\d\.\d+", capsys.readouterr().out))
    assert low <= robust <= min(high, clean)
