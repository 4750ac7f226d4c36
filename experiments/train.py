"""Trains one model of a configuration, in the run directory that `experiments.reproduce` uses as well.

    python -m experiments.train --config=experiments/configs/mnist.py:cpu --model=rcnn_plus

The same command goes on where a stopped one was. Exit code 2 with one message where something is wrong.
"""

from rbf_jax import process

if __name__ == "__main__":
    process.ensure()

from absl import flags

from experiments import cost, jobs, learn
from experiments.recipes import RECIPES

MODEL = flags.DEFINE_enum("model", None, list(RECIPES), "which model")


def job() -> None:
    """The filters that the model needs, then the model."""
    run, name = jobs.open_run(), str(MODEL.value)
    examples = learn.load(run.config, jobs.DATA_DIR.value)
    stages = cost.training(run, examples, (name,), cost.speeds(run, examples))
    print(f"{run.config.title}: {name}, in {run.directory}\n{cost.say(stages)}", flush=True)
    learn.train_model(run, examples, name)
    if jobs.PUBLISH.value:
        jobs.publish(run, (name,), [learn.filters_path(run)] if RECIPES[name].own_filters else [])
    print(f"weights: {learn.weights_path(run, name)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("model")
    jobs.main(job)
