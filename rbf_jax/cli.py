"""The command ``rbf-jax``: filters, training, attacks and certificates on the known data sets, from a shell."""

import argparse
import contextlib
import sys
from collections.abc import Sequence

import jax

from rbf_jax import parallel, process
from rbf_jax.commands import BETA2, COMMANDS, DRAWS, NORMS, PRESET, SETS
from rbf_jax.reconstruction import PRESETS

EXAMPLES = """\
a first tour, in about five minutes and without any data files:

  rbf-jax fit-filters --out filters.npz
  rbf-jax train --filters filters.npz --out rcnn.npz
  rbf-jax attack rcnn.npz --norm linf --norm l2 --out rcnn-attacked.npz
  rbf-jax certify rcnn.npz --images 5 --samples 1000
  rbf-jax report rcnn-attacked.npz

Add --data mnist or --data cifar10 to the first two for the full sets (`make data` prepares them).
"""


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "rbf-jax",
        description="RBF-CNN in JAX: a defence against adversarial examples, and what tests it.",
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, example: str, *, reads_data: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text}.", epilog=f"example:\n  rbf-jax {example}", formatter_class=formatter
        )
        if reads_data:
            made.add_argument("--data-dir", help="folder of the prepared data (default: that of tensorflow-datasets)")
        return made

    def defended(made: argparse.ArgumentParser) -> None:
        made.add_argument("model", help="a file that `rbf-jax train` wrote")
        made.add_argument("--beta2", type=float, help=f"noise of a model with filters; 0: none ({BETA2})")
        made.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")

    made = command("fit-filters", "learn RBF filters from the training images", "fit-filters --out filters.npz")
    made.add_argument("--data", choices=SETS, default="embedded", help="whose images (%(default)s)")
    made.add_argument("--out", required=True, help="the file to write, .npz")

    made = command("train", "train a model, behind filters an rCNN", "train --filters filters.npz --out rcnn.npz")
    made.add_argument("--data", choices=SETS, default="embedded", help="which data (%(default)s)")
    made.add_argument("--filters", help="of `rbf-jax fit-filters`; without them a plain CNN is trained")
    made.add_argument("--preset", choices=PRESETS, help=f"the reading of beta1, with filters ({PRESET})")
    made.add_argument("--epochs", type=_positive, default=3, help="passes over the images (%(default)s)")
    made.add_argument("--batch-size", type=_positive, default=128, help="images in a step (%(default)s)")
    made.add_argument(
        "--smoothing", type=float, default=0.1, help="of the labels, as the released code has it; 0: none (%(default)s)"
    )
    made.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    made.add_argument("--out", required=True, help="the file to write, .npz; a stopped training goes on from beside it")

    made = command("attack", "attack a model, and say what is left", "attack rcnn.npz --norm linf --epsilon 0.3")
    defended(made)
    made.add_argument("--images", type=_positive, default=50, help="the first so many test images (%(default)s)")
    made.add_argument("--norm", choices=NORMS, action="append", help="may be given several times (linf)")
    made.add_argument("--epsilon", type=float, action="append", help="radius, for each norm (the paper's)")
    made.add_argument(
        "--suite",
        choices=("quick", "autoattack"),
        default="quick",
        help="quick: FGSM, PGD, APGD; with noise PGD and APGD over its draws (%(default)s)",
    )
    made.add_argument("--draws", type=_positive, help=f"that a prediction with noise averages ({DRAWS})")
    made.add_argument("--out", help="also write the outcome of each image, .npz, for `rbf-jax report`")

    made = command("certify", "certify l2 radii by randomized smoothing", "certify rcnn.npz --sigma 0.3")
    defended(made)
    made.add_argument("--images", type=_positive, default=10, help="the first so many test images (%(default)s)")
    made.add_argument("--sigma", type=float, default=0.2, help="of the smoothing noise (%(default)s)")
    made.add_argument("--samples", type=_positive, default=10_000, help="for each image (%(default)s)")
    made.add_argument("--alpha", type=float, default=0.001, help="probability of a wrong certificate (%(default)s)")

    made = command("report", "say what files of outcomes hold", "report rcnn-attacked.npz", reads_data=False)
    made.add_argument("outcomes", nargs="+", help="files of `rbf-jax attack --out`, or ledgers of results/")

    command("info", "versions, devices and data", "info")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Runs a command; 0 where it ended well, 2 with one message where the user can mend what is wrong."""
    arguments = parser().parse_args(words)
    if words is None:
        process.ensure()
    try:
        with jax.set_mesh(parallel.mesh()) if jax.device_count() > 1 else contextlib.nullcontext():
            COMMANDS[arguments.command](arguments)
    except (OSError, ValueError, ArithmeticError) as error:
        print(f"rbf-jax {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
