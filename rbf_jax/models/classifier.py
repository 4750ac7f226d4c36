"""The one shape in which the rest of the package sees a network: a pair of pure functions."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from rbf_jax.types import Array, Key, LogitsFn

Variables = Any
"""A pytree: the parameters under ``"params"``, and what else the network keeps (running means) under other names."""


class InitFn(Protocol):
    """Makes variables for images of a shape ``(H, W, C)``."""

    def __call__(self, key: Key, shape: tuple[int, ...], /) -> Variables:
        """The first variables."""
        ...


class ApplyFn(Protocol):
    """Applies the network."""

    def __call__(
        self, variables: Variables, images: Array, *, train: bool = False, key: Key | None = None
    ) -> tuple[Array, Variables]:
        """Logits ``(B, classes)`` and the new state: every collection but ``"params"``, unchanged unless training."""
        ...


class Classifier(NamedTuple):
    """A network as pure functions.

    Attributes:
        init: (key, (H, W, C)) -> variables.
        apply: ``(variables, images, *, train=False, key=None) -> (logits, state)``; training needs a key for dropout.
    """

    init: InitFn
    apply: ApplyFn


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def from_linen(module: nn.Module) -> Classifier:
    """A Linen module whose ``__call__(images)`` or ``__call__(images, *, train)`` returns logits, as a Classifier.

    One without ``train``, such as a Sequential, which hands on none to its layers, behaves in training as it does
    otherwise: fine without dropout and batch norm. In training ``apply`` raises ValueError without a key.

    Raises:
        ValueError: the module has other arguments, and no ``train``: it may be told by another name that it trains.
    """
    named = [p.name for p in inspect.signature(module.__call__).parameters.values() if p.kind not in _REST]
    told = "train" in named
    if not told and len(named) > 1:
        raise ValueError(
            f"{type(module).__name__} must be called (images) or (images, *, train), got ({', '.join(named)}): wrap it "
            "in a module that is, or it might be trained as if it were not"
        )

    def call(train: bool) -> dict[str, Any]:
        return {"train": train} if told else {}

    def init(key: Key, shape: tuple[int, ...]) -> Variables:
        return module.init(key, jnp.zeros((1, *shape)), **call(False))

    def apply(
        variables: Variables, images: Array, *, train: bool = False, key: Key | None = None
    ) -> tuple[Array, Variables]:
        state = {name: value for name, value in variables.items() if name != "params"}
        if not train:
            return jnp.asarray(module.apply(variables, images, **call(False))), state
        if key is None:
            raise ValueError("key must be given when train=True (dropout draws from it), got None")
        rngs = {"dropout": key}
        logits, state = module.apply(variables, images, **call(True), rngs=rngs, mutable=list(state))
        return logits, state

    return Classifier(init, apply)


def from_nnx(module: nnx.Module) -> Classifier:
    """An NNX module called as ``module(images)``, as a Classifier; ``init`` returns its present variables.

    Dropout and batch norm follow ``train`` as in ``module.train()`` / ``module.eval()``. A module with dropout must
    have been built with ``rngs``; the key given to ``apply`` replaces their state, and in training ``apply`` raises
    ValueError without one.
    """
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def init(key: Key, shape: tuple[int, ...]) -> Variables:
        del key, shape
        return {"params": params, "state": state}

    def apply(
        variables: Variables, images: Array, *, train: bool = False, key: Key | None = None
    ) -> tuple[Array, Variables]:
        # copy=True: without it, gradients with respect to the parameters alone fail where batch norm writes its state.
        merged = nnx.merge(graph, variables["params"], variables["state"], copy=True)
        if not train:
            merged.eval()
            return merged(images), {"state": variables["state"]}
        if key is None:
            raise ValueError("key must be given when train=True (dropout draws from it), got None")
        merged.train()
        streams = sorted({node.tag for _, node in nnx.iter_graph(merged) if isinstance(node, nnx.RngStream)})
        keys: dict[str, Any] = {name: jax.random.fold_in(key, i) for i, name in enumerate(streams)}
        nnx.reseed(merged, **keys)
        logits = merged(images)
        return logits, {"state": nnx.split(merged, nnx.Param, ...)[2]}

    return Classifier(init, apply)


def behind(front: Callable[[Array], Array], classifier: Classifier) -> Classifier:
    """A network behind a front end: ``f(front(x))``, with the gradient through both (adversarial training of rCNN).

    Args:
        front: images ``(B, H, W, C)`` -> images of that shape.
        classifier: the network; the variables are its own.
    """

    def apply(
        variables: Variables, images: Array, *, train: bool = False, key: Key | None = None
    ) -> tuple[Array, Variables]:
        return classifier.apply(variables, front(images), train=train, key=key)

    return Classifier(classifier.init, apply)


@functools.cache
def _logits(apply: ApplyFn) -> Callable[[Variables, Key, Array], Array]:
    def logits(variables: Variables, key: Key, images: Array) -> Array:
        del key
        return apply(variables, images)[0]

    return logits


def logits_fn(classifier: Classifier, variables: Variables) -> LogitsFn:
    """The trained network as a deterministic LogitsFn: a ``Partial`` over the variables, so that it may cross ``jit``.

    The same classifier gives the same function: other variables cost no recompilation.

    Raises:
        ValueError: a network that is no Classifier.
    """
    if not isinstance(classifier, Classifier):
        made = "as models.from_linen and models.from_nnx make of a module"
        raise ValueError(f"classifier must be a Classifier, {made}, got {type(classifier).__name__}")
    return Partial(_logits(classifier.apply), variables)
