"""AutoAttack: its parts in order, for a suite that goes on with what is not broken yet."""

from rbf_jax.attacks.apgd import apgd, apgd_t
from rbf_jax.attacks.driver import Iterative
from rbf_jax.attacks.fab import fab, fab_t
from rbf_jax.attacks.gradients import eot
from rbf_jax.attacks.losses import dlr
from rbf_jax.attacks.square import square
from rbf_jax.checks import check_choice, check_count, check_norm
from rbf_jax.types import Norm

EOT_DRAWS = 20


def autoattack(version: str, norm: Norm, *, epsilon: float, classes: int = 10) -> dict[str, Iterative]:
    """The attacks of AutoAttack by name, ``"apgd-ce-linf"``, in their order, for `evaluate.run_suite`.

    - ``"standard"``: APGD-CE, APGD-T, FAB-T (9 targets each), Square (5,000 queries); for deterministic models. In l1
      APGD-CE restarts five times and APGD-T has five targets.
    - ``"rand"``: APGD-CE and APGD-DLR with 20 draws for each gradient; for randomised models.
    - ``"plus"``: APGD-CE, APGD-DLR, FAB (five restarts each), Square, APGD-T, FAB-T.

    Args:
        version: which of them.
        norm: `Linf`, `L2` or `L1`.
        epsilon: radius of the ball, at least 0.
        classes: of the model; the targeted parts try at most all wrong ones.

    Returns:
        The attacks. What a randomised model's images are worth is for the suite's judge to say, not for the draws that
        the attack saw.

    Raises:
        ValueError: an unknown version, or fewer than 4 classes (3 for ``"rand"``), for which the loss is not defined:
            there `apgd` and `apgd_t` take ``loss=margin``.

    Reference: Croce and Hein, ICML 2020; for l1 ICML 2021.
    """
    check_norm(norm)
    check_choice(version, "version", ("standard", "rand", "plus"))
    check_count(classes, "classes", 3 if version == "rand" else 4)
    targets = min(classes - 1, 5 if norm.name == "l1" and version == "standard" else 9)
    targeted = {
        "apgd-t": apgd_t(norm, epsilon=epsilon, classes=targets),
        "fab-t": fab_t(norm, epsilon=epsilon, classes=min(classes - 1, 9)),
    }
    queries = {"square": square(norm, epsilon=epsilon, queries=5000, horizon=10_000)}
    if version == "rand":
        parts = {
            "apgd-ce": apgd(norm, epsilon=epsilon, gradient=eot(EOT_DRAWS)),
            "apgd-dlr": apgd(norm, epsilon=epsilon, loss=dlr, gradient=eot(EOT_DRAWS)),
        }
    elif version == "standard":
        parts = {"apgd-ce": apgd(norm, epsilon=epsilon, restarts=5 if norm.name == "l1" else 1), **targeted, **queries}
    else:
        parts = {
            "apgd-ce": apgd(norm, epsilon=epsilon, restarts=5),
            "apgd-dlr": apgd(norm, epsilon=epsilon, restarts=5, loss=dlr),
            "fab": fab(norm, epsilon=epsilon, restarts=5),
            **queries,
            **targeted,
        }
    # By norm, so that suites of several can be joined.
    return {f"{name}-{norm.name}": attack for name, attack in parts.items()}
