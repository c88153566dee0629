"""Draws, penalties, stop strings and log-probabilities are those of transformers' generate and torch's forward pass."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, sample
from jaxsft.sample import STOP_STRING, Draw, answers, stops
from jaxsft.sample.draw import cut, penalise

from .pairs import documents, theirs, torch

pytestmark = pytest.mark.parity
STORIES = Path(__file__).parents[3] / "shared" / "data" / "lm_stories260k" / "hf"

DRAWS = [
    Draw(1.0),
    Draw(0.7, top_k=5),
    Draw(1.3, top_p=0.8),
    Draw(1.0, min_p=0.1),
    Draw(0.8, top_k=40, top_p=0.9),
    Draw(1.5, 100, 0.95, 0.02),
    Draw(1.0, top_p=0.01),
    Draw(1.0, top_k=10_000, top_p=0.999),
    Draw(0.6, 7, 0.7, 0.3, 1.4),
]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_what_is_kept_and_how_likely_it_is_are_those_of_transformers_in_its_order(draw, difference):
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    B, V, random = 16, 500, np.random.default_rng(0)
    scores, said = random.normal(size=(B, V)).astype(np.float32) * 3, random.integers(0, V, (B, 30))
    small = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = GenerationConfig(
        do_sample=True,
        temperature=draw.temperature,
        top_k=draw.top_k,
        top_p=draw.top_p,
        min_p=draw.min_p or None,
        repetition_penalty=draw.repetition_penalty,
    )
    wraps = LlamaForCausalLM(small)._get_logits_processor(config, 30, logits_processor=[])
    expected = wraps(torch.tensor(said), torch.tensor(scores)).softmax(-1).numpy()
    seen = np.zeros((B, V), bool)
    seen[np.arange(B)[:, None], said] = True
    penalised = penalise(jnp.asarray(scores), jnp.asarray(seen), draw.repetition_penalty)
    shares = np.array(cut(penalised / draw.temperature, draw))
    for row, token in np.argwhere((shares > 0) != (expected > 0)):  # sums of float32 differ in the last bits
        whole = torch.tensor(scores[row]).double().softmax(-1).numpy()
        assert abs(whole[whole > whole[token]].sum() - draw.top_p) < 1e-6  # it is the last one, or the first beyond
        shares[row, token] = expected[row, token] = 0
    np.testing.assert_array_equal(shares > 0, expected > 0)
    ours, wanted = (x / x.sum(-1, keepdims=True) for x in (shares, expected))
    assert difference("sampling: probabilities", ours, wanted) < 1e-6


@pytest.mark.parametrize("pair", ["llama-gqa-tied", "gemma2-windows"], indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_drawn_tokens_are_those_of_torchs_forward_pass(pair, temperature, difference):
    prompts = [p.tolist() for p in documents([1, 14, 40, 5, 40], seed=3)]
    how = {"max_new_tokens": 24, "draw": Draw(temperature, top_p=0.9), "key": jax.random.key(0), "samples": 2}
    found = sample.generate(pair.model, {"params": pair.params}, prompts, **how, slots=3)
    for row, (tokens, logprobs) in enumerate(zip(found.tokens, found.logprobs, strict=True)):
        whole = np.array([prompts[row // 2] + tokens.tolist()])
        scores = torch.tensor(theirs(pair.theirs, whole)[0, -25:-1]) / temperature
        expected = scores.log_softmax(-1)[torch.arange(24), torch.tensor(tokens).long()].numpy()
        assert difference(f"sampling: log-probabilities at {temperature}", logprobs, expected) < 1e-4


@pytest.mark.parametrize("pair", ["llama-gqa-tied", "qwen3-tied"], indirect=True)
def test_a_repetition_penalty_leads_where_it_leads_transformers_whatever_side_is_padded(pair):
    prompts = [p.tolist() for p in documents([1, 14, 40], seed=3)]
    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    alone = []
    for prompt in prompts:
        how = {"do_sample": False, "max_new_tokens": 32, "repetition_penalty": 1.3, "pad_token_id": 0}
        ids = torch.tensor([prompt])
        out = pair.theirs.generate(ids, attention_mask=torch.ones_like(ids), **how, eos_token_id=None)
        alone.append(out[0, len(prompt) :].tolist())
    how = {"max_new_tokens": 32, "draw": Draw(repetition_penalty=1.3)}
    assert answers(sample.generate(pair.model, {"params": pair.params}, prompts, **how)) == alone
    batch = pair.theirs.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=32, pad_token_id=0, eos_token_id=None
    )
    greedy = answers(sample.generate(pair.model, {"params": pair.params}, prompts, max_new_tokens=32))
    assert greedy == batch[:, width:].tolist()


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")
@pytest.mark.parametrize("strings", [[" time"], ["e was", "xyz"], ["ay"], [".\n", "Lily."], ["nowhere to be found"]])
def test_stop_strings_end_a_story_where_transformers_ends_it(strings):
    from transformers import AutoModelForCausalLM

    model, params = hub.load(str(STORIES))
    tokenizer = hub.load_tokenizer(str(STORIES))
    prompt = tokenizer("Lily and Tom", add_special_tokens=True)["input_ids"]
    torch_model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    out = torch_model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=60,
        stop_strings=strings,
        tokenizer=tokenizer,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    found = sample.generate(
        model, {"params": params}, [prompt], max_new_tokens=60, strings=stops.compile(strings, tokenizer)
    )
    assert answers(found) == [out]
    text = tokenizer.decode(out)
    assert (found.finish[0] == STOP_STRING) == any(string in text for string in strings)
    [short] = sample.texts(found, tokenizer, strings)
    assert text.startswith(short)
    assert not any(string in short for string in strings)
