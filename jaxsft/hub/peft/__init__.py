"""Adapters in PEFT's file format, both ways.

    lora/blocks/0-3/attn/q/a  [4, in, r]   <->   base_model.model.<module of layer 0..3>.lora_A.weight  [r, in]
    lora/blocks/0-3/attn/q/b  [4, r, out]  <->   base_model.model.<module of layer 0..3>.lora_B.weight  [out, r]
    lora/blocks/0-3/attn/q/m  [4, out]     <->   base_model.model.<module of layer 0..3>.lora_magnitude_vector  [out]
    lora/embed/a, b  [V, r], [r, D]        <->   base_model.model.<embedding>.lora_embedding_A, B  [r, V], [D, r]
    params/norm/scale, trained beside it   <->   base_model.model.<module>.weight, and the module in modules_to_save
    a bias, trained without its kernel     <->   base_model.model.<module>.base_layer.bias or .bias, and the key bias

Ranks that differ within a stack are padded with zeros, which never move: where A and B are both zero, so are both
gradients. An export leaves them out again. A0 and B0 are exported as more of A and B, see `lora.folded`.
"""

from jaxsft.hub.peft.load import load_adapter
from jaxsft.hub.peft.save import export_adapter

__all__ = ["export_adapter", "load_adapter"]
