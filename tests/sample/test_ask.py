from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import sample
from jaxsft.models import EncoderConfig, build, logits

from .conftest import MODEL, NEW, PROMPTS


def test_an_asker_answers_all_questions_in_words(variables, greedy):
    class Words:
        def decode(self, ids, skip_special_tokens):
            return f" {ids} " if skip_special_tokens else ""

    ask = sample.asker(MODEL, Words(), PROMPTS, (), sample.Config(max_new_tokens=NEW))
    assert ask(variables) == [str(answer) for answer in greedy]
    assert sample.asker(MODEL, Words(), [], (), sample.Config())(variables) == []


def test_masks_are_filled_with_the_likeliest_token_at_their_place_whatever_row_they_lie_in():
    model = build(EncoderConfig(23, 16, 24, 1, heads=2, max_position=64))
    leaves, form = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    draw = np.random.default_rng(5)
    params = jax.tree.unflatten(form, [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves])
    passages, mask = [[1, 3, 9, 3, 2], [1, 7, 8, 3, 10, 11, 12, 2], [1, 5, 2]], 3
    names = SimpleNamespace(decode=lambda ids: f" t{ids[0]}")
    found = sample.filler(model, names, passages, mask)({"params": params})
    expected = []
    alone = jax.jit(lambda row: logits(model, {"params": params}, model.features({"params": params}, row)))
    for passage in passages[:2]:
        best = np.argmax(alone(np.array([passage]))[0], axis=-1)
        expected.append(", ".join(f"t{best[i]}" for i, token in enumerate(passage) if token == mask))
    assert found == [*expected, ""]
    assert sample.filler(model, names, [], mask)({"params": params}) == []
