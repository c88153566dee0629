"""A small base for adapters: two kinds of layer in a stack of three, tables, and leaves that nothing adapts.

Arrays are numpy's: an operation on those needs no compilation.
"""

import jax
import numpy as np

from jaxsft import lora, tree

LAYERS, IN, OUT, VOCAB = 3, 64, 40, 7
TRAINS = ("a", "b", "m")


def base(dtype=np.float32, tied=False):
    draw = np.random.default_rng(0)
    shapes = {
        "embed/table": (VOCAB, IN),
        "blocks/0-2/attn/q/kernel": (LAYERS, IN, OUT),
        "blocks/0-2/attn/q/bias": (LAYERS, OUT),
        "blocks/0-2/mlp/down/kernel": (LAYERS, OUT, IN),
        "norm/scale": (IN,),
    } | ({} if tied else {"head/table": (VOCAB, IN)})
    return tree.nest({p: draw.normal(size=s).astype(dtype) for p, s in shapes.items()})


def filled(spec, seed=1, params=None):
    """An adapter in which everything that trains has moved away from where it started."""
    draw = np.random.default_rng(seed)
    adapter = tree.flat(jax.device_get(lora.init(jax.random.key(seed), params or base(), spec)))
    for path, leaf in adapter.items():
        if path.rpartition("/")[2] in TRAINS:
            adapter[path] = leaf + (0.5 * draw.normal(size=leaf.shape)).astype(np.float32)
    return tree.nest(adapter)
