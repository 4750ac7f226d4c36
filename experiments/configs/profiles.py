"""How much a configuration computes: its profile.

smoke   minutes: every stage once, on a slice
cpu     two cores, hours
gpu     one GPU or a TPU slice: a modern short schedule
paper   the paper's own schedule and attack strength; only by name
"""

import jax

PROFILES = ("smoke", "cpu", "gpu", "paper")


def chosen(profile: str | None, allowed: tuple[str, ...] = PROFILES) -> str:
    """The named profile, or the one for the device that JAX runs on.

    Raises:
        ValueError: there is no such profile.
    """
    if profile is None:
        return "cpu" if jax.default_backend() == "cpu" else "gpu"
    if profile not in allowed:
        raise ValueError(f"PROFILE must be one of {', '.join(allowed)}, got {profile!r}")
    return profile
