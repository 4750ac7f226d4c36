"""What a run says it will cost, before it starts."""

import numpy as np
import pytest

from experiments import cost
from experiments.catalogue import ATTACK_STEP
from experiments.configs import mnist
from experiments.learn import Data, Examples
from experiments.rundir import Run


@pytest.mark.parametrize(
    ("name", "flips", "epochs_seconds", "once"),
    [
        # By hand, for a forward pass of 1 s and a reconstruction of 10 s: 40 images of 3.5 s a step, 5 that validate;
        # a quarter more where 12 Gaussian and 12 adversarial noises join a batch of 96.
        ("cnn", False, 40 * 3.5 + 5, 0),
        ("rcnn", False, 40 * 3.5 + 5, 0),
        ("rcnn", True, 40 * (3.5 + 10) + 5, 0),
        ("cnn_plus", False, 40 * 3.5 * 1.25 + 5, 8 * 3 * ATTACK_STEP),
        ("rcnn_plus", False, 40 * (3.5 * 1.25 + 10 * 0.25) + 5, 8 * 3 * 11 * ATTACK_STEP),
        ("rcnn_plus", True, 40 * (3.5 * 1.25 + 10 * 1.25) + 5, 8 * 3 * 11 * ATTACK_STEP),
        ("madry", True, 40 * (3.5 + 7 * ATTACK_STEP) + 5, 0),
        ("rcnn_at", True, 40 * (3.5 + 7 * 11 * ATTACK_STEP) + 5, 0),
    ],
)
def test_what_a_training_takes(tmp_path, name, flips, epochs_seconds, once):
    config = mnist.get_config("cpu")
    config.epochs, config.train.epochs, config.train.batch_size, config.train.flips = {name: 3}, 9, 96, flips
    config.noise.update(count=12, bank_examples=8, bank_steps=3)
    config.adversarial.steps = 6
    (tmp_path / "filters.npz").touch()
    parts = (Examples(np.zeros((count, 1, 1, 1), np.float32), np.zeros(count, np.int32)) for count in (40, 5, 2))
    stages = cost.training(Run(tmp_path, config), Data(*parts), [name], cost.Speeds(1.0, 10.0))
    assert [title for title, _ in stages] == [f"training {name}, 3 epochs"]
    assert stages[0][1] == pytest.approx(3 * epochs_seconds + once)
