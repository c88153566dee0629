"""What the backward pass finds kept, under each policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import remat

D, N, LAYERS = 8, 4, 3
INPUT, PRODUCT = "float32[3,4,8]", "float32[3,4,16]"  # of all layers


def layer(x, kernel):
    """Of its results one is dear, the product; the backward pass needs that, sine and cosine of it, and the input."""
    y = remat.dear(x @ kernel)
    return x + jnp.sin(y)[:, :D] * jnp.cos(jnp.sin(y))[:, D:], None


def loss(kernels, x, policy):
    return jax.lax.scan(remat.rematerialise(policy)(layer), x, kernels)[0].sum()


def kept(policy):
    """What the loop forward hands the loop backward, a slice a layer."""
    kernels, x = jnp.ones((LAYERS, D, 2 * D)), jnp.ones((N, D))
    program = jax.make_jaxpr(jax.grad(loss), static_argnums=2)(kernels, x, policy)
    forward = next(one for one in program.eqns if one.primitive.name == "scan")
    return sorted(v.aval.str_short() for v in forward.outvars[forward.params["num_carry"] :])


def test_a_policy_keeps_what_it_says():
    assert len(kept("none")) > 3
    assert kept("dots") == [PRODUCT, INPUT]
    assert kept("block") == [INPUT]
    assert kept("offload") == ["float32<host>[3,4,8]"]


def test_gradients_are_those_of_the_plain_layers():
    rng = np.random.default_rng(0)
    kernels, x = rng.normal(size=(LAYERS, D, 2 * D)).astype(np.float32), rng.normal(size=(N, D)).astype(np.float32)
    found = {policy: jax.jit(jax.grad(loss), static_argnums=2)(kernels, x, policy) for policy in remat.POLICIES}
    for policy, gradient in found.items():
        np.testing.assert_allclose(gradient, found["none"], rtol=1e-5, atol=1e-6, err_msg=policy)


def test_an_unknown_policy_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="remat policy 'all' is not known; known are none, dots, block, offload"):
        remat.rematerialise("all")
