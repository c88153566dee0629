"""Random pairs and answers, and losses computed one by one in Python's float64."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import Scored


def softplus(x: float) -> float:
    """log(1 + exp(x)), so that -log sigmoid(x) is softplus(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


@pytest.fixture(scope="session")
def draw() -> Callable[..., Scored]:
    """draw(n, ...) -> n random pairs that exist; `reference=False`: with zeros for one."""

    def make(n: int = 7, *, seed: int = 0, reference: bool = True) -> Scored:
        random = np.random.default_rng(seed)
        counts = random.integers(1, 20, (2, n))
        policy = -random.exponential(1.0, (2, n)) * counts - 0.01
        ref = policy + random.normal(scale=5.0, size=(2, n)) if reference else np.zeros((2, n))
        arrays = (jnp.asarray(x, jnp.float32) for x in (*policy, *ref, *counts))
        return Scored(*arrays, exists=jnp.ones(n, bool))

    return make


@pytest.fixture(scope="session")
def one_by_one() -> Callable[..., list[float]]:
    """one_by_one(pairs, formula) -> formula(pair) of each, with the pair's numbers as Python floats in a namespace."""

    class Pair:
        def __init__(self, *numbers: float) -> None:
            self.lp_c, self.lp_r, self.ref_c, self.ref_r, self.n_c, self.n_r, self.exists = numbers
            self.c, self.r = self.lp_c - self.ref_c, self.lp_r - self.ref_r  # log-ratios
            self.a_c, self.a_r = self.lp_c / self.n_c, self.lp_r / self.n_r

    def compute(pairs: Scored, formula: Callable[[Any], float]) -> list[float]:
        return [formula(Pair(*(float(x[i]) for x in pairs))) for i in range(len(pairs.exists))]

    return compute
