"""The package's arrows point one way, and importing it stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rbf_jax"

# What each part may import of the package. These four are the ground that all stand on.
GROUND = {"types", "checks", "files", "parallel"}
MAY_IMPORT = {
    "types": set(),
    "checks": {"types"},
    "files": set(),
    "parallel": {"types", "checks"},
    "process": set(),
    "identity": {"types", "checks"},
    "patches": GROUND,
    "rbf": GROUND | {"patches"},
    "em_gradient": GROUND | {"patches", "rbf"},
    "em_rules": GROUND,
    "em": GROUND | {"patches", "rbf", "em_gradient", "em_rules"},
    "bounds": GROUND | {"patches", "rbf"},
    "reconstruction": GROUND | {"patches", "rbf"},
    "defense": GROUND | {"patches", "rbf", "reconstruction"},
    "certify": GROUND,
    "saliency": GROUND | {"attacks"},
    "models": GROUND,
    "attacks": GROUND,
    "train": GROUND | {"identity", "models"},
    "evaluate": GROUND | {"attacks", "identity"},
    "data": GROUND,
    "plots": GROUND | {"rbf", "saliency"},
    "commands": GROUND
    | {"attacks", "certify", "data", "defense", "em", "evaluate", "models", "rbf", "reconstruction", "train"},
    "cli": GROUND | {"commands", "process", "reconstruction"},
}
# Who alone may import what of others.
ONLY = {
    "flax": {"models"},
    "optax": {"train", "attacks", "em_gradient", "commands"},
    "tensorflow_datasets": {"data"},
    "pooch": {"data"},
    "mlxtend": {"data"},
    "matplotlib": {"plots"},
    "orbax": {"train"},
    "absl": set(),
    "ml_collections": set(),
    "tensorflow": set(),
}


def part(path: Path) -> str:
    """The part of the package that a file belongs to: its module, or its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """All modules that a source imports, at the top or within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    own = part(path)
    assert own in MAY_IMPORT, f"{own} has no place in the order of parts"
    for name in imports(path.read_text()):
        top, *rest = name.split(".")
        if top == "rbf_jax":
            # `from rbf_jax import x` would go through the public API and so depend on everything.
            assert rest[0] in MAY_IMPORT, f"{own} imports {name}"
            assert rest[0] == own or rest[0] in MAY_IMPORT[own], f"{own} imports {name}"
        assert own in ONLY.get(top, {own}), f"{own} imports {name}"


def test_the_rule_sees_a_breach():
    assert imports("def f():\n    from rbf_jax.defense import defend") == {"rbf_jax.defense.defend"}


def test_import_is_light():
    heavy = [
        "tensorflow",
        "tensorflow_datasets",
        "matplotlib",
        "orbax.checkpoint",
        "pooch",
        "mlxtend",
        "ml_collections",
        "scipy.stats",
    ]
    code = f"import sys, rbf_jax; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_reexports_only():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
