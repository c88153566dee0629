"""What a backbone's vectors tell of classes before anything is trained: nearest neighbours, and a linear probe.

Both are baselines to fine-tuning: where they are as good, the vectors had it all. Vectors go in, [N, D], which are
`model.features` without a classifier; scores come out, the same every time.

    neighbours   the k most alike of the known images vote, by cosine (Wu et al. 2018, arXiv:1805.01978, section 3.4)
    linear       logistic regression on standardised vectors, by Newton-like steps to its one optimum (L-BFGS)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def accuracy(scores: Float[Array, "N K"], labels: Int[Array, "N"]) -> float:
    """The share of rows whose highest score is the label's; of equal ones the first counts.

    Example:
      >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), jnp.array([1, 1, 1])) == 2 / 3
      True
    """
    return float(np.mean(np.argmax(np.asarray(scores), axis=1) == np.asarray(labels)))


@functools.partial(jax.jit, static_argnames=("classes", "k"))
def neighbours(
    known: Float[Array, "N D"],
    labels: Int[Array, "N"],
    vectors: Float[Array, "M D"],
    *,
    classes: int,
    k: int = 5,
    temperature: float = 0.07,
) -> Float[Array, "M K"]:
    """Votes of the k nearest known vectors for each class, each of the weight exp(cosine / temperature).

    Args:
      known, labels: vectors whose class is known; k of them at most vote.
      vectors: those to classify.
      classes: how many there are.
      k: how many vote.
      temperature: the smaller, the more the nearest counts.

    Returns:
      votes as shares of 1.

    Example:
      >>> known = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.0, 2.0]])
      >>> neighbours(known, jnp.array([0, 0, 1]), jnp.array([[0.1, 1.0]]), classes=2, k=1).tolist()
      [[0.0, 1.0]]
    """
    unit = lambda x: x.astype(jnp.float32) / jnp.maximum(jnp.linalg.norm(x.astype(jnp.float32), axis=1), 1e-12)[:, None]
    alike = jnp.matmul(unit(vectors), unit(known).T, precision=jax.lax.Precision.HIGHEST)
    nearest, at = jax.lax.top_k(alike, min(k, len(known)))
    weights = jax.nn.softmax(nearest / temperature, axis=1)
    return jnp.einsum("mk,mkc->mc", weights, jax.nn.one_hot(labels[at], classes))


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def linear(
    known: Float[Array, "N D"],
    labels: Int[Array, "N"],
    vectors: Float[Array, "M D"],
    *,
    classes: int,
    decay: float = 1e-3,
    steps: int = 100,
) -> Float[Array, "M K"]:
    """Log-probabilities of a linear classifier fitted to the known vectors.

    It minimises the mean of -log p(label) and decay / 2 |W|^2, W on vectors of which each feature has been brought to
    mean 0 and deviation 1; the bias does not decay. The problem is convex, and has one answer, whatever it starts from.

    Args:
      known, labels: vectors whose class is known.
      vectors: those to classify.
      classes: how many there are.
      decay: of the weights.
      steps: of L-BFGS, at most; it begins at zero.

    Example:
      >>> known, labels = jnp.array([[-1.0], [1.0], [2.0]]), jnp.array([0, 1, 1])
      >>> linear(known, labels, jnp.array([[-3.0], [3.0]]), classes=2).argmax(axis=1).tolist()
      [0, 1]
    """
    full = known.astype(jnp.float32)
    mean, deviation = full.mean(axis=0), jnp.maximum(full.std(axis=0), 1e-6)
    standard = lambda x: (x.astype(jnp.float32) - mean) / deviation
    given, exact = standard(known), jax.lax.Precision.HIGHEST
    score = lambda p, x: jax.nn.log_softmax(jnp.matmul(x, p["kernel"], precision=exact) + p["bias"])

    def loss(p):
        own = jnp.take_along_axis(score(p, given), labels[:, None], axis=1)
        return -own.mean() + decay / 2 * jnp.square(p["kernel"]).sum()

    tx, start = optax.lbfgs(), {"kernel": jnp.zeros((known.shape[1], classes)), "bias": jnp.zeros(classes)}
    measure = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        p, state = carry
        value, grad = measure(p, state=state)
        updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(p, updates), state), None

    (fitted, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=steps)
    return score(fitted, standard(vectors))
