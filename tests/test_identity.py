"""What tells one computation from another: the same in every process, different wherever the result may be."""

import subprocess
import sys
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attack_helpers import mlp
from flax import nnx
from jax.tree_util import Partial
from ml_collections import ConfigDict

from rbf_jax import RBFFilters, attacks, defend
from rbf_jax.identity import described


def shifted(by, images):
    return images + by


def closing_over(value):
    return lambda images: images + value


class Scaled:
    def __init__(self, by):
        self.by = by


def nnx_module(scale):
    return nnx.Linear(2, 3, kernel_init=nnx.initializers.constant(scale), rngs=nnx.Rngs(0))


def defended(**changes):
    filters = RBFFilters(jnp.zeros((2, 3, 3, 1)), jnp.ones(2))
    return defend(filters, mlp(0), **{"beta1": 17.0, "beta2": 1.0, "draws": 2} | changes)


def things():
    """Pairwise different."""
    return {
        "pgd": attacks.pgd(attacks.Linf, epsilon=0.1, steps=10),
        "another radius": attacks.pgd(attacks.Linf, epsilon=0.2, steps=10),
        "more steps": attacks.pgd(attacks.Linf, epsilon=0.1, steps=11),
        "another norm": attacks.pgd(attacks.L2, epsilon=0.1, steps=10),
        "another loss": attacks.pgd(attacks.Linf, epsilon=0.1, steps=10, loss=attacks.margin),
        "draws": attacks.pgd(attacks.Linf, epsilon=0.1, steps=10, gradient=attacks.eot(3)),
        "more draws": attacks.pgd(attacks.Linf, epsilon=0.1, steps=10, gradient=attacks.eot(4)),
        "apgd": attacks.apgd(attacks.Linf, epsilon=0.1, steps=10),
        "square": attacks.square(attacks.Linf, epsilon=0.1, queries=10),
        "transferred": attacks.transfer(attacks.pgd(attacks.Linf, epsilon=0.1, steps=10), mlp(0)),
        "from another": attacks.transfer(attacks.pgd(attacks.Linf, epsilon=0.1, steps=10), mlp(1)),
        **{f"form {name}": form for name, form in defended()._asdict().items()},
        "less noise": defended(beta2=0.5).predict,
        "another noise": defended(noise="per_patch").predict,
        "more predictions": defended(draws=3).predict,
        "a closure": closing_over(1),
        "another closure": closing_over(2),
        "of an array": closing_over(np.ones(2)),
        "a lambda": lambda images: images * 2,
        "another lambda": lambda images: images * 2 + 1,
        "partial": partial(shifted, 1),
        "other arguments": partial(shifted, 2),
        "a Partial": Partial(shifted, jnp.ones(1)),
        "other weights": Partial(shifted, jnp.zeros(1)),
        "jitted": jax.jit(shifted),
        "an NNX module in a closure": closing_over(nnx_module(1.0)),
        "of other weights": closing_over(nnx_module(2.0)),
        "an object of one's own": closing_over(Scaled(1.0)),
        "with another attribute": closing_over(Scaled(2.0)),
        "a namespace": closing_over(types.SimpleNamespace(sign=1)),
        "another namespace": closing_over(types.SimpleNamespace(sign=-1)),
        "a configuration": closing_over(ConfigDict({"model": {"width": 8}})),
        "another configuration": closing_over(ConfigDict({"model": {"width": 16}})),
        "a ufunc": closing_over(np.sin),
        "another ufunc": closing_over(np.cos),
        "a flag": (True, 1),
        "no flag": (1, 1),
    }


def test_what_differs_is_told_apart():
    found = {name: described(thing) for name, thing in things().items()}
    assert len(set(found.values())) == len(found), found


def test_what_is_made_again_is_the_same():
    again = things()
    for name, thing in things().items():
        assert described(thing) == described(again[name]), name


NOTEBOOK = """
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
W = np.ones(3)
def helper(x): return x * {factor}
class Net(nn.Module):
    @nn.compact
    def __call__(self, x): return nn.{activation}(x)
net = Net()
def reads_a_global(x): return x @ W
def has_a_constant(x): return [y + {factor} for y in (x, x)]
def looks_up(x): return np.{function}(x)
def calls(x): return helper(x)
def asks_a_set(x): return x in {{"a", "{member}"}}
def applies(x): return net.apply({{}}, x)
def builds(x): return Net().apply({{}}, x)
class Own:
    level = {factor}
class HasProperty:
    @property
    def twice(self): return {factor}
class HasStatic:
    @staticmethod
    def fixed(x): return {factor} * x
class HasClassMethod:
    @classmethod
    def made(cls): return {factor}
def asks_a_class(x): return Own.level * x
anonymous = lambda x: x * {factor}
"""
FIRST = {"factor": 2, "function": "sin", "activation": "relu", "member": "b"}


def in_a_notebook(**changes):
    cells: dict[str, Any] = {"__name__": "__main__"}
    exec(NOTEBOOK.format(**FIRST | changes), cells)
    return cells


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("has_a_constant", {"factor": 3}),
        ("anonymous", {"factor": 3}),
        ("calls", {"factor": 3}),
        ("looks_up", {"function": "cos"}),
        ("asks_a_set", {"member": "c"}),
        ("applies", {"activation": "tanh"}),
        ("builds", {"activation": "tanh"}),
        ("net", {"activation": "tanh"}),
        ("asks_a_class", {"factor": 3}),
        ("Own", {"factor": 3}),
        ("HasProperty", {"factor": 3}),
        ("HasStatic", {"factor": 3}),
        ("HasClassMethod", {"factor": 3}),
    ],
)
def test_a_function_of_one_s_own_is_its_code_and_what_it_calls(name, changes):
    first, again, other = (in_a_notebook(**change)[name] for change in ({}, {}, changes))
    assert described(first) == described(again) != described(other)


def test_a_function_is_the_globals_that_it_reads():
    """Weights in a global, as in notebooks: a retrained model must not be handed the results of the old one."""
    cells = in_a_notebook()
    before, unconcerned = described(cells["reads_a_global"]), described(cells["calls"])
    cells["W"] = -cells["W"]
    assert described(cells["reads_a_global"]) != before
    assert described(cells["calls"]) == unconcerned


def test_a_thing_that_holds_itself():
    cycle: list = [1]
    cycle.append(cycle)
    assert described(cycle) != described([1])


IN_A_PROCESS = """
from rbf_jax import attacks
from rbf_jax.identity import described
print(described(attacks.autoattack("rand", attacks.Linf, epsilon=0.3)))
"""


def test_another_process_says_the_same():
    result = subprocess.run([sys.executable, "-c", IN_A_PROCESS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == described(attacks.autoattack("rand", attacks.Linf, epsilon=0.3))


@pytest.mark.parametrize("thing", [object(), {1, 2}, jnp.float32])
def test_what_it_does_not_know_is_told_by_its_type(thing):
    assert described(thing) == described(thing)
