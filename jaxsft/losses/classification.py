"""Classification: the cross entropy of one class of K, with weights of classes and smoothed or shared targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def cross_entropy(
    scores: Float[Array, "B K"],
    targets: Float[Array, "B K"],
    *,
    weights: Float[ArrayLike, "K"] | None = None,
    smoothing: float = 0.0,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """-sum_k w_k t_k log softmax(scores)_k of each example, t = (1 - e) y + e / K, and the weight sum_k w_k y_k.

    The mean over a step is sum(loss) / sum(weight), once. For targets of one class that is torch's
    `CrossEntropyLoss(weight, label_smoothing)`, whose mean divides by the weights of the classes that are wanted. For
    targets that are shared out torch divides by the number of examples; here an example that is 30 % of one class
    weighs 30 % of what that class weighs, so that a mixture near one class is near that class.

    Args:
      scores: before the softmax; computed with in float32, whatever they are.
      targets: y, whose rows sum to 1.
      weights: of the classes.
      smoothing: e, the share of the target that all classes get alike.

    Example:
      >>> loss, weight = cross_entropy(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([[0.0, 1.0, 0.0]]))
      >>> round(float(loss[0]), 3), float(weight[0])
      (1.386, 1.0)

    Source: label smoothing, Szegedy et al. 2015, arXiv:1512.00567, section 7.
    """
    logprobs = jax.nn.log_softmax(scores.astype(jnp.float32))
    wanted = targets.astype(jnp.float32)
    each = jnp.ones(scores.shape[-1]) if weights is None else jnp.asarray(weights)
    smooth = (1 - smoothing) * wanted + smoothing / scores.shape[-1]
    return -(each * smooth * logprobs).sum(-1), (each * wanted).sum(-1)
