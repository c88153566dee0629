"""What tests of checkpoint folders do with them."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxsft.hub.files import SINGLE

# Ours -> Hugging Face's, written out by hand.
MODULES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn/qkv": "self_attn.qkv_proj",
    "mlp/gate_up": "mlp.gate_up_proj",
}
QWEN_MOE = {
    "moe/router": "mlp.gate",
    "moe/experts/gate": "mlp.experts.{}.gate_proj",
    "moe/experts/up": "mlp.experts.{}.up_proj",
    "moe/experts/down": "mlp.experts.{}.down_proj",
    "moe/shared/gate": "mlp.shared_expert.gate_proj",
    "moe/shared/up": "mlp.shared_expert.up_proj",
    "moe/shared/down": "mlp.shared_expert.down_proj",
    "moe/shared_gate": "mlp.shared_expert_gate",
}
MIXTRAL = {
    "moe/router": "block_sparse_moe.gate",
    "moe/experts/gate": "block_sparse_moe.experts.{}.w1",
    "moe/experts/up": "block_sparse_moe.experts.{}.w3",
    "moe/experts/down": "block_sparse_moe.experts.{}.w2",
}
GPT2 = {
    "attn/qkv": "attn.c_attn",
    "attn/o": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
}
# Where norms follow attention and MLP, the name that Llama has for the one before the MLP is that of another.
SANDWICH = MODULES | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
PLAIN = {
    "embed/table": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/table": "lm_head.weight",
}
PLAIN_GPT2 = {
    "embed/table": "transformer.wte.weight",
    "embed/positions": "transformer.wpe.weight",
    "norm/scale": "transformer.ln_f.weight",
    "norm/bias": "transformer.ln_f.bias",
    "head/table": "lm_head.weight",
}


def expected(raw, path):
    """The value of a leaf, from the tensors of the file by a plain loop over its layers and experts."""
    gpt2 = "transformer.wte.weight" in raw
    plain = PLAIN_GPT2 if gpt2 else PLAIN
    if path in plain:
        return raw[plain[path]]
    home, modules = "model.layers", SANDWICH if "model.layers.0.post_feedforward_layernorm.weight" in raw else MODULES
    modules = modules | (MIXTRAL if any(".block_sparse_moe." in name for name in raw) else QWEN_MOE)
    if gpt2:
        home, modules = "transformer.h", GPT2
    _, name, *module, part = path.split("/")
    first, last = map(int, name.split("-"))
    kind = "bias" if part == "bias" else "weight"

    def one(layer):
        if module == ["attn"]:
            return raw[f"{home}.{layer}.self_attn.sinks"]
        if (fused := f"{home}.{layer}.mlp.experts.{module[-1]}_proj") in raw and "experts" in module:  # gpt-oss
            return raw[fused + "_bias" * (part == "bias")]
        if module == ["moe", "router"] and f"{home}.{layer}.mlp.router.weight" in raw:
            x = raw[f"{home}.{layer}.mlp.router.{kind}"]
        else:
            x = f"{home}.{layer}.{modules['/'.join(module)]}.{kind}"
            if "{}" in x:
                number = sum(x.replace("{}", str(e)) in raw for e in range(99))
                return np.stack([raw[x.format(e)].T for e in range(number)])
            x = raw[x]
        return x.T if part == "kernel" and not gpt2 else x

    return np.stack([one(layer) for layer in range(first, last + 1)])


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def raw_of(folder):
    """All tensors of a folder, by name."""
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def rewrite(folder, change):
    """Writes a folder's single file again after `change(tensors)`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)
