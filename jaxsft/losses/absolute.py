"""Losses of each answer's reward by itself, beta log policy / reference, beside or instead of their difference.

A loss of the difference alone may make both answers less likely, as long as the rejected one falls faster. These say
where each is to go: the chosen one up and the rejected one down (apo_down: both down). An f-divergence other than
reverse KL leaves a term of the prompt in a single reward, so there is no such option here.
"""

import jax
from jaxtyping import Array, Float

from jaxsft.losses.scored import Losses, Scored, existing, ratios, result


def nca_pair(pairs: Scored, *, beta: float = 0.1) -> Losses:
    """NCA for pairs: -log sigmoid(c) - 1/2 log sigmoid(-c) - 1/2 log sigmoid(-r), with rewards c and r.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = nca_pair(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))
      >>> round(float(loss[0]), 4)  # 2 log 2
      1.3863

    Source: Chen et al. 2024, arXiv:2402.05369, section 4.1; beta is its alpha.
    """
    pairs, chosen, rejected = _rewards(pairs, beta)
    pull = -jax.nn.log_sigmoid(chosen)
    push = -0.5 * jax.nn.log_sigmoid(-chosen) - 0.5 * jax.nn.log_sigmoid(-rejected)
    return result(pairs, pull + push, (chosen, rejected))


def bco_pair(pairs: Scored, *, beta: float = 0.1) -> Losses:
    """BCO for pairs: -log sigmoid(c) - log sigmoid(-r), the two answers told apart by a classifier.

    As in TRL no mean reward is subtracted, see `kto.bco` for that; LLaMA-Factory subtracts a running one.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = bco_pair(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))
      >>> round(float(loss[0]), 4)
      1.3863

    Source: Jung et al. 2024, arXiv:2404.04656, section 4.
    """
    pairs, chosen, rejected = _rewards(pairs, beta)
    loss = -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)
    return result(pairs, loss, (chosen, rejected))


def sppo_hard(pairs: Scored, *, beta: float = 0.1) -> Losses:
    """SPPO with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2, where c and r are log-ratios, without beta.

    The paper's probability that an answer wins, which another model estimates there, is 1 for chosen, 0 for rejected.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = sppo_hard(Scored(ones, -ones, zeros, zeros, ones, ones, ones > 0), beta=0.5)
      >>> loss.tolist()
      [0.0]

    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7; beta is 1 / eta.
    """
    pairs = existing(pairs)
    chosen, rejected = ratios(pairs)
    loss = (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2
    return result(pairs, loss, (beta * chosen, beta * rejected))


def apo_zero(pairs: Scored, *, beta: float = 0.1) -> Losses:
    """APO-zero: 1 - sigmoid(c) + sigmoid(r). Chosen up, rejected down: for answers better than the model's own.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> apo_zero(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))[0].tolist()
      [1.0]

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7.
    """
    pairs, chosen, rejected = _rewards(pairs, beta)
    return result(pairs, jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected), (chosen, rejected))


def apo_down(pairs: Scored, *, beta: float = 0.1) -> Losses:
    """APO-down: sigmoid(c) + 1 - sigmoid(c - r). Both down, rejected further: for answers worse than the model's own.

    Where policy and reference agree the two terms of the chosen answer cancel, and only the rejected one moves.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> apo_down(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))[0].tolist()
      [1.0]

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8.
    """
    pairs, chosen, rejected = _rewards(pairs, beta)
    return result(pairs, jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen), (chosen, rejected))


def _rewards(pairs: Scored, beta: float) -> tuple[Scored, Float[Array, "N"], Float[Array, "N"]]:
    pairs = existing(pairs)
    chosen, rejected = ratios(pairs)
    return pairs, beta * chosen, beta * rejected
