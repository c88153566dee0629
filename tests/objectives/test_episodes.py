"""What models say of packed episodes is what they say of each episode alone."""

import functools

import jax
import numpy as np
import pytest

from jaxsft import objectives, tree
from jaxsft.objectives import episodes

from . import rollouts as rl

CLOSE = {"atol": 3e-5, "rtol": 0}


def critic_by_hand(learner, method: str, critic: str) -> dict:
    """The critic's variables as one would write them down."""
    own, policy = learner.variables["value"], episodes.policy_of(learner.variables)
    if critic == "shared":
        return {**policy, "params": {**policy["params"], **own["params"]}}
    if method == "full":
        return own
    given = {"params": tree.nest(tree.flat(policy["params"]) | tree.flat(own["params"]))}
    return given | ({"lora": own["lora"]} if "lora" in own else {})


KINDS = [
    ("head", "own", "adapter"),
    ("tables", "own", "adapter"),
    ("full", "own", "whole"),
]


@pytest.mark.parametrize(("method", "critic", "judged"), KINDS, ids=lambda x: str(x))
def test_packed_episodes_are_assessed_as_each_of_them_alone(method, critic, judged):
    """Policy, reference, critic and reward model, at temperature 0.7, in pieces; every one of them is another model."""
    learner, temperature = rl.learner(method, critic), 0.7
    variables, judge, scorer = learner.variables, None, None
    if judged == "adapter":
        judge, own = rl.MODEL, rl.reward_adapter()
        scorer = {"params": {**rl.base(), **own["params"]}, "lora": own["lora"]}
        kept = learner.frozen.get("reference", {})  # what trains, as it was: see session.with_judge
        variables = {**variables, "reward": {**own, "params": {**kept, **own["params"]}}}
    if judged == "whole":
        judge, scorer = rl.WHOLE, rl.reward_whole()
        variables = {**variables, "reward": scorer}
    tokens, episode = rl.drawn().packed
    assess = functools.partial(episodes.assess, rl.MODEL, temperature=temperature, reference=True, judge=judge)
    found = jax.jit(functools.partial(assess, pieces=rl.PIECES))(variables, tokens)
    learned = rl.learned(tokens)
    policy = rl.logprobs_alone(episodes.policy_of(learner.variables), temperature)
    reference = rl.logprobs_alone({"params": rl.base()}, temperature)
    values = rl.values_alone(rl.MODEL, critic_by_hand(learner, method, critic))
    scores = rl.values_alone(judge, scorer) if judge else None
    assert max(np.abs(a - b).max() for a, b in zip(policy, reference, strict=True)) > 0.1
    for number, prompt in enumerate(rl.drawn().prompts):
        of = functools.partial(rl.by_episode, episode=episode, number=number, learned=learned)
        np.testing.assert_allclose(of(found.old), policy[number], **CLOSE)
        np.testing.assert_allclose(of(found.reference), reference[number], **CLOSE)
        np.testing.assert_allclose(of(found.value), values[number][len(prompt) - 1 : -1], **CLOSE)  # what chooses
        said = of(found.score)
        assert not said[:-1].any()
        assert said[-1] == pytest.approx(scores[number][-1] if scores else 0, abs=3e-5)  # read at the last token
    for part in found:
        assert part.dtype == np.float32
        assert not np.asarray(part)[~learned].any()


def test_who_is_not_asked_says_nothing():
    variables = episodes.policy_of(rl.learner("lora").variables)
    tokens, episode = rl.drawn().packed
    assess = functools.partial(episodes.assess, rl.MODEL, temperature=1.0, reference=False)
    found = jax.jit(assess)(variables, tokens)
    for part in found[1:]:
        assert not np.asarray(part).any()
    for number, wanted in enumerate(rl.logprobs_alone(variables)):
        np.testing.assert_allclose(rl.by_episode(found.old, episode, number, rl.learned(tokens)), wanted, **CLOSE)


def test_a_policy_that_learns_in_one_step_need_not_be_asked():
    variables = episodes.policy_of(rl.learner("lora").variables)
    tokens, _ = rl.drawn().packed
    assess = functools.partial(episodes.assess, rl.MODEL, temperature=1.0, reference=False, old=False)
    assert not any(np.asarray(part).any() for part in jax.jit(assess)(variables, tokens))
    assert "dot_general" not in str(jax.make_jaxpr(assess)(variables, tokens))


def test_temperature_0_is_read_as_1():
    variables = episodes.policy_of(rl.learner("lora").variables)
    tokens, _ = rl.drawn().packed
    read = lambda t: str(jax.make_jaxpr(lambda x: episodes.read(rl.MODEL, x, tokens, None, temperature=t))(variables))
    assert read(0.0) == read(1.0) != read(0.5)


def test_with_lora_policy_reference_critic_and_reward_model_are_the_same_arrays():
    learner = rl.learner("lora", "own")
    variables = {**learner.variables, "reward": rl.reward_adapter()}
    base = tree.flat(variables["params"])
    seen = [episodes.policy_of(variables), episodes.seen_as(variables, "value"), episodes.seen_as(variables, "reward")]
    for one in seen:
        own = tree.flat(one["params"])
        assert set(base) <= set(own) <= {*base, "score/kernel"}
        assert all(own[path] is leaf for path, leaf in base.items())
    kept = objectives.reference(variables)
    assert set(kept) == {"params"}
    for path, leaf in tree.flat(kept["params"]).items():
        assert leaf.unsafe_buffer_pointer() == base[path].unsafe_buffer_pointer()
    trains = tree.flat(learner.trainable)
    assert all(path.startswith(("lora/", "value/lora/", "value/params/score/")) for path in trains)


@pytest.mark.parametrize("method", ["full", "partial", "tables"])
def test_a_critic_of_its_own_has_another_copy_of_what_trains_but_no_output_layer(method):
    learner = rl.learner(method, "own")
    own, policy = (tree.flat(part) for part in (learner.trainable["value"], learner.trainable))
    wanted = {path for path in policy if not path.startswith(("value/", "params/head/", "lora/head/"))}
    assert set(own) == {*wanted, "params/score/kernel"}
    assert not {leaf.unsafe_buffer_pointer() for leaf in own.values()} & {
        leaf.unsafe_buffer_pointer() for path, leaf in policy.items() if not path.startswith("value/")
    }


def test_a_whole_model_stands_alone_even_where_the_base_is_packed():
    base = {"params": {"blocks": {"0-1": {"norm": 1}}}, "packed": {"blocks": {"0-1": {"q": 2}}}}
    whole = {"params": {"blocks": {"0-1": {"norm": 3, "q": {"kernel": 4}}}, "score": {"kernel": 5}}}
    assert episodes.seen_as({**base, "reward": whole}, "reward") == whole
    small = {"lora": {"a": 6}, "params": {"score": {"kernel": 5}}}
    assert episodes.seen_as({**base, "reward": small}, "reward") == {
        "params": {"blocks": {"0-1": {"norm": 1}}, "score": {"kernel": 5}},
        "packed": base["packed"],
        "lora": {"a": 6},
    }


def test_sums_and_spreads_are_those_of_a_loop():
    _, episode = rl.drawn().packed
    x = np.random.default_rng(0).normal(size=episode.shape).astype(np.float32)
    sums = np.asarray(episodes.each(x, episode, rl.EPISODES))
    for number in range(rl.EPISODES):
        assert sums[number] == pytest.approx(x[episode == number].sum(dtype=np.float64), abs=1e-5)
    spread = np.asarray(episodes.spread(sums, episode))
    for where in np.ndindex(*episode.shape):
        assert spread[where] == (sums[episode[where]] if episode[where] < rl.EPISODES else 0)
