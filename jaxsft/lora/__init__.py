"""Low-rank adapters: h = W0 x + scale B A x, W0 frozen (Hu et al. 2021, arXiv:2106.09685, eq. 3), and their kin.

An adapter is a tree beside the parameters, at the same addresses:

    params/blocks/0-7/attn/q/kernel   [8, in, out]
    lora/blocks/0-7/attn/q/a          [8, in, r]     uniform in +-1/sqrt(in), as PEFT draws it
    lora/blocks/0-7/attn/q/b          [8, r, out]    zero: at first, x A B adds exactly nothing
    lora/blocks/0-7/attn/q/scale      [8]            alpha / r; a constant, kept here so that a tree says all of itself
    lora/blocks/0-7/attn/q/m          [8, out]       DoRA: the norm of each column of the adapted kernel
    lora/blocks/0-7/attn/q/a0, b0                    PiSSA, OLoRA: what A and B started at, constants

The embedding's table [V, D] is a kernel from V to D, `lora/embed`; the output layer's one from D to V, `lora/head`.
What trains is `TRAINABLE`; since the base is another tree, "only A and B receive updates" holds by construction.
"""

from jaxsft.lora.merge import Adapter, adapted, attach, folded, layers, merge, weighted
from jaxsft.lora.spec import ALL, TRAINABLE, LoRA, matrix, rank, rules, scale, targets
from jaxsft.lora.start import STARTS, complete, init

__all__ = [
    "ALL",
    "STARTS",
    "TRAINABLE",
    "Adapter",
    "LoRA",
    "adapted",
    "attach",
    "complete",
    "folded",
    "init",
    "layers",
    "matrix",
    "merge",
    "rank",
    "rules",
    "scale",
    "targets",
    "weighted",
]
