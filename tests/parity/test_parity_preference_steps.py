"""Whole steps of preference learning beside TRL: the same checkpoint, the same tokens, loss and gradients."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import data, hub, objectives
from jaxsft.hub import names
from jaxsft.hub.merge import fetch
from jaxsft.types import Pairs

from . import trl_preference

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS = [
    {"prompt": "The sky is", "chosen": " blue today.", "rejected": " a green lamp, or so they said."},
    {"prompt": "Once upon a time there was", "chosen": " a girl who had a red ball.", "rejected": " no."},
    {"prompt": "Two and two", "chosen": " are four.", "rejected": " are five."},
    {"prompt": "The cat is called", "chosen": " Button, and she sleeps all day long.", "rejected": " Tom."},
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in ROWS
    for side in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def folders(tiny):
    """A policy and another model for reference."""
    return tiny("llama", tokenizer=True, seed=0), tiny("llama", tokenizer=True, seed=1)


def document(prompt: list[int], answer: list[int]) -> data.Example:
    ids = np.array([*prompt, *answer], np.int32)
    return data.Example(ids, np.arange(len(ids)) >= len(prompt))


def packed(both: list[tuple[data.Example, data.Example]], values=None) -> Pairs:
    """Two pairs a row."""
    plan = [list(range(i, min(i + 2, len(both)))) for i in range(0, len(both), 2)]
    rows = data.pairs_in_memory(both, 128, plan, values=values)
    return Pairs(*(jnp.stack(part) for part in zip(*rows, strict=True)))


def named(folder, gradients: Mapping) -> dict[str, np.ndarray]:
    """Gradients by the names of parameters in files."""
    family, config = hub.read_config(folder)
    known = names.by_address(family, gradients)
    return {
        name: fetch(*known[address], transposed=transposed, dtype=np.dtype("float32"))
        for name, (address, transposed) in names.places(family, config).items()
        if address in known
    }


def same(ours: tuple[float, dict], theirs: trl_preference.Step, difference: Callable, what: str) -> None:
    loss, gradients = ours
    assert difference(f"{what}, loss of a step", loss, theirs.loss) < 1e-5
    found = set(theirs.gradients) - {"lm_head.weight"} if "lm_head.weight" not in gradients else set(theirs.gradients)
    assert found == set(gradients)
    size = max(np.abs(g).max() for g in theirs.gradients.values())
    assert size > 1e-3
    for name, gradient in gradients.items():
        assert difference(f"{what}, gradients of a step", gradient / size, theirs.gradients[name] / size) < 1e-4


def step(folder, pairwise_of: Callable, batch: Pairs, reference=None) -> tuple[float, dict]:
    """The loss of all pairs and its gradient, by names."""
    model, params = hub.load(str(folder))
    beside = {} if reference is None else {"reference": hub.load(str(reference))[1]}
    pairwise = pairwise_of(model)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        sums = pairwise.objective({"params": params, **beside}, batch, None)
        return sums.loss / sums.weight

    loss, gradients = mean(params)
    return float(loss), named(folder, gradients)


LOSSES = {
    "sigmoid": ({"sigmoid": 1.0}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"ipo": 1.0}, {"loss_type": ["ipo"]}),
    "aot": ({"aot": 1.0}, {"loss_type": ["aot"]}),
    "sigmoid and sft": ({"sigmoid": 1.0, "sft": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
    "LD-DPO": ({"sigmoid": 1.0}, {"loss_type": ["sigmoid"], "ld_alpha": 0.4}),
    "WPO": ({"sigmoid": 1.0}, {"loss_type": ["sigmoid"], "use_weighting": True}),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_of_dpo_is_that_of_trl(folders, difference, kind):
    (policy, reference), (terms, options) = folders, LOSSES[kind]
    theirs = trl_preference.dpo(policy, ROWS, reference=reference, beta=0.3, **options)
    batch = packed(
        [
            tuple(document(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected"))
            for row in theirs.rows
        ]
    )
    more = {"ld_alpha": options.get("ld_alpha"), "wpo": "use_weighting" in options}
    learning = lambda model: objectives.preference(model, terms, beta=0.3, **more)
    same(step(policy, learning, batch, reference), theirs, difference, f"DPO, {kind}")


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_step_of_kto_is_that_of_trl(folders, difference, loss):
    policy, reference = folders
    weights = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    theirs = trl_preference.kto(policy, JUDGED, reference=reference, loss_type=loss, **weights)
    # Which other row's answer stands for the KL is a matter of the data; here it is TRL's.
    both = [
        (document(row["prompt_ids"], row["completion_ids"]), document(row["prompt_ids"], other["completion_ids"]))
        for row, other in zip(theirs.rows, [theirs.rows[-1], *theirs.rows[:-1]], strict=True)
    ]
    batch = packed(both, [float(row["label"]) for row in theirs.rows])
    learning = lambda model: objectives.judged(model, loss, **weights)
    same(step(policy, learning, batch, reference), theirs, difference, loss)


def test_a_step_of_orpo_is_that_of_trl_where_the_prompt_is_one_token(folders, difference):
    """TRL's likelihood is that of prompt and answer, the paper's (equation 2) and ours of the answer alone.

    One token of prompt is predicted from nothing, so that there the two are the same.
    """
    policy, _ = folders
    rows = [{**row, "prompt": "The"} for row in ROWS]
    theirs = trl_preference.orpo(policy, rows, beta=0.3)
    sides = [[_prompt_and_answer(row, side) for side in ("chosen", "rejected")] for row in theirs.rows]
    assert {len(prompt) for both in sides for prompt, _ in both} == {1}
    batch = packed([tuple(document(*side) for side in both) for both in sides])
    learning = lambda model: objectives.preference(model, {"orpo": 1.0}, beta=0.3)
    same(step(policy, learning, batch), theirs, difference, "ORPO")


def _prompt_and_answer(row: Mapping, side: str) -> tuple[list[int], list[int]]:
    ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    return ids[:start], ids[start:]


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_a_step_of_a_reward_model_is_that_of_trl(folders, difference, center):
    policy, _ = folders
    head = 0.3 * np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    theirs = trl_preference.reward(policy, ROWS, head=head, center_rewards_coefficient=center or None)
    whole = lambda ids, start: data.Example(np.array(ids, np.int32), np.arange(len(ids)) >= start)
    both = []
    for row in theirs.rows:
        shared = next(i for i, (a, b) in enumerate(zip(row["chosen_ids"], row["rejected_ids"], strict=False)) if a != b)
        both.append((whole(row["chosen_ids"], shared), whole(row["rejected_ids"], shared)))
    model, variables = hub.load_variables(str(policy), labels=1, key=jax.random.key(0))
    params = {**variables["params"], "score": {"kernel": jnp.asarray(head.T)}}
    pairwise, batch = objectives.bradley_terry(model, center=center), packed(both)

    @jax.jit
    @jax.value_and_grad
    def mean(params):
        sums = pairwise.objective({"params": params}, batch, None)
        return sums.loss / sums.weight

    loss, gradients = mean(params)
    same((float(loss), named(policy, gradients)), theirs, difference, "reward model")
