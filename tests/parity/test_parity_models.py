"""Every family and option gives the logits and the greedy continuations of transformers' torch model."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, models, sample

from .pairs import BY_LENGTH, CASES, SHAPE, VOCAB, alone, documents, load_torch, ours, pack, theirs, torch, transformers

pytestmark = pytest.mark.parity
every = pytest.mark.parametrize("pair", CASES, indirect=True)

T = 160  # more than one block of queries, see models.attention.BLOCK
NEW = 64


@every
def test_logits_are_those_of_torch(pair, difference):
    tokens = np.stack(documents([T] * 4))
    expected = theirs(pair.theirs, tokens)
    assert expected.std() > 0.5  # else an absolute tolerance would say nothing
    got = ours(pair.model, {"params": pair.params}, tokens)
    assert difference("logits, float32", got, expected) < 1e-4


@every
def test_right_padding_changes_no_real_token(pair, difference):
    rows = documents([T, 131, 40, 3], seed=1)
    packed = pack([[row] for row in rows], T)
    if pair.name in BY_LENGTH:
        expected = np.zeros((*packed.tokens.shape, VOCAB), np.float32)
        for i, row in enumerate(rows):
            expected[i, : len(row)] = alone(pair, row)
    else:
        expected = theirs(pair.theirs, packed.tokens, packed.segments)
    got = ours(pair.model, {"params": pair.params}, packed.tokens, packed.positions, packed.segments)
    real = packed.segments > 0
    assert difference("logits, float32, right-padded", got[real], expected[real]) < 1e-4


@every
def test_a_packed_document_reads_as_it_does_alone(pair, difference):
    a, b, c, d, e, f, g, h = documents([T, 80, 80, 100, 50, 3, 1, 140], seed=2)
    packed = pack([[a], [b, c], [d, e], [f, g, h]], T)
    got = ours(pair.model, {"params": pair.params}, packed.tokens, packed.positions, packed.segments)
    for (row, columns), document in zip(packed.places, [a, b, c, d, e, f, g, h], strict=True):
        assert difference("logits, float32, packed", got[row, columns], alone(pair, document)) < 1e-4


@every
def test_bfloat16_is_no_further_from_float32_than_torch_in_bfloat16(pair, difference):
    tokens = np.stack(documents([T] * 4))
    full = theirs(pair.theirs, tokens)
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float64) - full) ** 2)))
    model, params = hub.load(str(pair.folder), dtype=jnp.bfloat16)
    error = rms(ours(model, {"params": params}, tokens))
    allowed = rms(theirs(load_torch(pair.folder, "bfloat16"), tokens))
    difference("logits, bfloat16: our rms error over torch's", error / allowed, 0.0)
    assert error < 2 * allowed


@every
def test_greedy_continuations_of_ragged_prompts_are_those_of_each_alone_in_torch(pair):
    prompts = [p.tolist() for p in documents(BY_LENGTH.get(pair.name, [1, 5, 14, 40]), seed=3)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = load_torch(pair.folder).generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert all(len(answer) == NEW for answer in expected)
    variables = {"params": pair.params}
    assert sample.answers(sample.generate(pair.model, variables, prompts, max_new_tokens=NEW)) == expected
    assert list(sample.stream(pair.model, variables, prompts[-1], max_new_tokens=NEW)) == expected[-1]


@pytest.mark.parametrize("pair", ["llama-gqa-tied", "qwen2-mixed-windows"], indirect=True)
def test_a_checkpoint_with_the_config_keys_of_transformers_4_reads_the_same(pair, tmp_path, difference):
    old = hub.files.read_json(pair.folder / "config.json")
    rope = old.pop("rope_parameters")
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": old.pop("dtype")}
    old.pop("layer_types", None)
    hub.files.write_json(tmp_path / "config.json", old)
    (tmp_path / "model.safetensors").symlink_to(pair.folder / "model.safetensors")
    tokens = np.stack(documents([T] * 2))
    model, params = hub.load(str(tmp_path))
    got = ours(model, {"params": params}, tokens)
    assert difference("logits, config of transformers 4", got, theirs(load_torch(tmp_path), tokens)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "absent"),
    [("MistralConfig", "sliding_window"), ("Qwen2Config", "max_window_layers"), ("Qwen3Config", "max_window_layers")],
)
def test_a_window_key_that_config_json_leaves_out_has_transformers_default(kind, absent):
    """transformers 5 gives Mistral a window of 4096, and Qwen windows from layer 28 on."""
    wide = {**SHAPE, "num_hidden_layers": 32, "use_sliding_window": True, "sliding_window": 64}
    wide = {key: value for key, value in wide.items() if kind != "MistralConfig" or "window" not in key}
    full = getattr(transformers, kind)(**wide).to_dict()
    left = {key: value for key, value in full.items() if key not in (absent, "layer_types")}
    types = full.get("layer_types", ["sliding_attention"] * 32)
    expected = tuple(full["sliding_window"] if kind == "sliding_attention" else None for kind in types)
    assert any(expected)
    assert models.family_of(left).read_config(left).windows == expected
