"""Single attacks of the arena: their ledgers are those of one budget."""

import numpy as np
import pytest
from attack_helpers import linear

from experiments import arena
from experiments.learn import Examples
from rbf_jax import attacks


def test_a_ledger_of_another_budget_is_refused(tmp_path):
    """One pixel, of class 0 below 0.5: FGSM reaches the other side from 0.1 away within 0.2, and not within 0.05."""
    model = linear([[-1.0, 1.0]], [0.5, -0.5])
    images = np.full((4, 1, 1, 1), 0.4, np.float32)
    targets, rows = Examples(images, np.zeros(4, np.int32)), np.arange(4)

    def meet(epsilon, folder, draws=10):
        found = {"FGSM": attacks.fgsm(attacks.Linf, epsilon=epsilon)}
        suite = arena.Suite("secret noise", found, model, model, (1, 1), ("linf", epsilon))
        return arena.meet("FGSM", 0, suite, targets, rows, 4, 0, folder, {"draws": draws}).scoring

    assert not meet(0.2, tmp_path / "wide").any()
    assert meet(0.05, tmp_path / "narrow").all()
    assert not meet(0.2, tmp_path / "wide").any()
    with pytest.raises(ValueError, match=r"budget is \['linf', 0.2\], not \['linf', 0.05\]"):
        meet(0.05, tmp_path / "wide")
    with pytest.raises(ValueError, match="draws is 10, not 5"):
        meet(0.2, tmp_path / "wide", draws=5)
