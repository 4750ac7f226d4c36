"""What a run says it will cost, before it starts."""

import numpy as np
import pytest

from experiments import cost, evaluation
from experiments.catalogue import ATTACK_STEP, cells
from experiments.configs import mnist
from experiments.cost import STEP
from experiments.learn import Data, Examples
from experiments.rundir import Run


@pytest.mark.parametrize(
    ("name", "flips", "epochs_seconds", "once"),
    [
        # By hand, for a forward pass of 1 s and a reconstruction of 10 s: 40 images of STEP s a step, 5 that validate;
        # a quarter more where 12 Gaussian and 12 adversarial noises join a batch of 96.
        ("cnn", False, 40 * STEP + 5, 0),
        ("rcnn", False, 40 * STEP + 5, 0),
        ("rcnn", True, 40 * (STEP + 10) + 5, 0),
        ("cnn_plus", False, 40 * STEP * 1.25 + 5, 8 * 3 * ATTACK_STEP),
        ("rcnn_plus", False, 40 * (STEP * 1.25 + 10 * 0.25) + 5, 8 * 3 * 11 * ATTACK_STEP),
        ("rcnn_plus", True, 40 * (STEP * 1.25 + 10 * 1.25) + 5, 8 * 3 * 11 * ATTACK_STEP),
        ("madry", True, 40 * (STEP + 7 * ATTACK_STEP) + 5, 0),
        ("rcnn_at", True, 40 * (STEP + 7 * 11 * ATTACK_STEP) + 5, 0),
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


def test_what_is_left_of_a_stopped_run(tmp_path):
    """Up to the last checkpoint a training is paid for, and so are the batches that an attack has finished."""
    config = mnist.get_config("smoke")
    config.models, config.epochs, config.train.epochs, config.train.batch_size = ("cnn",), {}, 4, 10
    config.attack.plan, config.attack.examples = ((("cnn",), (("linf", 0.3),), ("pgd",), 100),), {"default": 100}
    config.attack.batch_size = 20
    run, speed = Run(tmp_path, config), cost.Speeds(1.0, 10.0)
    parts = (Examples(np.zeros((count, 1, 1, 1), np.float32), np.zeros(count, np.int32)) for count in (45, 5, 100))
    examples = Data(*parts)
    (tmp_path / "filters.npz").touch()
    ((_, training),) = cost.training(run, examples, ["cnn"], speed)
    clean, (_, attack) = cost.attacking(run, speed)
    for step in (4, 12):  # of 16
        (tmp_path / "checkpoints" / "cnn" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "cnn" / "16.tmp").mkdir()
    ((_, left),) = cost.training(run, examples, ["cnn"], speed)
    assert left == pytest.approx(training / 4)
    (cell,) = [cell for cell in cells(config) if cell.norm]
    evaluation.crafted_in(run, cell).mkdir(parents=True)
    scoring = 100.0
    for start, share in ((0, 0.8), (20, 0.6), (40, 0.4)):
        (evaluation.crafted_in(run, cell) / f"{start:06d}.npz").touch()
        after_clean, (_, left) = cost.attacking(run, speed)
        assert after_clean == clean
        assert left - scoring == pytest.approx(share * (attack - scoring))
    # Where images leave, four batches go into a file.
    for start in (20, 40):
        (evaluation.crafted_in(run, cell) / f"{start:06d}.npz").unlink()
    (evaluation.crafted_in(run, cell) / "000080.npz").touch()
    assert cost.attacking(run, speed)[1][1] == pytest.approx(scoring)
