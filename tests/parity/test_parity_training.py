"""Loss, gradients and AdamW steps are those of torch autograd on the same batch."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import hub, lora, make_step, objectives, optim, train, tree
from jaxsft.hub import names
from jaxsft.lora import LoRA
from jaxsft.types import Tokens

from .pairs import documents, pack, random_adapter, torch

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LLAMAS = ["llama-gqa-tied", "llama-biases", "qwen3-untied", "qwen3-tied"]
OTHERS = ["gemma2-windows", "gemma3-two-ropes", "olmo2-untied", "granite-multipliers", "smollm3-windows", "gpt2-tied"]
tiny = pytest.mark.parametrize("pair", LLAMAS, indirect=True)
all_kinds = pytest.mark.parametrize("pair", [*LLAMAS, *OTHERS], indirect=True)
both = pytest.mark.parametrize("tuning", ["lora", "full"])

IGNORED = -100  # the label that transformers leaves out
SPEC = LoRA(rank=4, alpha=6.0)


def batch(seed: int = 7) -> tuple[Tokens, list[tuple[np.ndarray, np.ndarray]]]:
    """Rows of one or two documents with padding and ragged masks, and the same documents one by one.

    Some masks begin at the first token, which nothing predicts: counting before the shift would count it.
    """
    docs = documents([30, 17, 9, 21, 4, 12], seed)
    rows = pack([docs[:1], docs[1:3], docs[3:5], docs[5:]], 32)
    draw = np.random.default_rng(seed)
    mask, alone = np.zeros(rows.tokens.shape, bool), []
    for i, ((row, columns), document) in enumerate(zip(rows.places, docs, strict=True)):
        learned = draw.random(len(document)) < 0.6 if i % 2 else np.arange(len(document)) >= 2 * i
        learned[0], learned[-1] = i in (0, 1), True
        mask[row, columns] = learned
        alone.append((document, learned))
    return Tokens(*map(jnp.asarray, (rows.tokens, mask, rows.positions, rows.segments))), alone


def torch_loss(model, alone):
    """Transformers' own loss: the sum over the learned tokens over their number, after its own shift of the labels."""
    count = sum(int(learned[1:].sum()) for _, learned in alone)
    longest = max(len(document) for document, _ in alone)
    ids, seen = (np.zeros((len(alone), longest), np.int64) for _ in range(2))
    labels = np.full((len(alone), longest), IGNORED)
    for i, (document, learned) in enumerate(alone):
        n = len(document)
        ids[i, :n], seen[i, :n], labels[i, :n] = document, 1, np.where(learned, document, IGNORED)
    give = {"input_ids": ids, "attention_mask": seen, "labels": labels}
    return model(**{k: torch.tensor(v) for k, v in give.items()}, num_items_in_batch=count, use_cache=False).loss, count


def sides(pair, tuning: str, folder):
    """(torch model, its trained parameters by our address, our variables, what trains)."""
    places = names.places(pair.family, pair.model.config)
    if tuning == "full":
        model = pair.fresh()
        trained = {places[name].address: (p, places[name].transposed) for name, p in model.named_parameters()}
        return model, trained, {"params": pair.params}, "params/.*"
    adapter = random_adapter(jax.random.key(2), lora.init(jax.random.key(1), pair.params, SPEC), 0.1)
    hub.export_adapter(str(folder), adapter, SPEC, family=pair.family, base=str(pair.folder))
    model = peft.PeftModel.from_pretrained(pair.fresh(), str(folder), is_trainable=True)
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            address = places[f"{module}.weight"].address
            path = f"{address.path.removesuffix('kernel')}{part[0].lower()}"
            trained[address._replace(path=path)] = (parameter, True)
    return model, trained, {"params": pair.params, "lora": adapter}, lora.TRAINABLE


def by_leaf(trained: Mapping, take, like: Mapping) -> dict[str, np.ndarray]:
    """Stacks what `take` gives for each torch parameter into the leaves of our tree."""
    leaves = {}
    for path in tree.flat(like):
        kind, _, inner = path.partition("/")
        plain, layers = names.unstacked(inner)
        parts = []
        for layer in layers or [None]:
            parameter, transposed = trained[names.Address(plain, layer)]
            value = take(parameter).detach().numpy()
            parts.append(value.T if transposed else value)
        leaves[f"{kind}/{inner}"] = parts[0] if layers is None else np.stack(parts)
    return leaves


def begin(variables, pattern: str, tx):
    """A state of copies, since a step is given its state to keep, and the pairs are shared."""
    trainable, frozen = tree.partition(variables, pattern)
    return train.init(jax.tree.map(jnp.copy, trainable), tx, jax.random.key(0)), frozen


@all_kinds
@both
@pytest.mark.parametrize("microbatches", [1, 4])
def test_one_sgd_step_has_the_loss_and_gradients_of_torch(pair, tuning, microbatches, tmp_path, difference):
    model, trained, variables, pattern = sides(pair, tuning, tmp_path)
    tokens, alone = batch()
    rate = 0.05
    optimizer = torch.optim.SGD([p for p, _ in trained.values()], lr=rate, momentum=0.9)
    loss, count = torch_loss(model, alone)
    loss.backward()

    tx = optax.sgd(rate, momentum=0.9)  # after one step its momentum is the gradient itself
    state, frozen = begin(variables, pattern, tx)
    own = {k: v for part in state.trainable.values() for k, v in part.items()}
    assert len(trained) == len(names.by_address(pair.family, own))
    step = make_step(objectives.supervised(pair.model), tx, microbatches=microbatches)
    state, metrics = step(state, frozen, tokens)

    assert int(metrics["trained_tokens"]) == count
    assert difference("training: loss, relative", metrics["loss"], loss.item(), relative=True) < 1e-5
    grads = tree.flat(state.opt_state[0].trace)
    expected = by_leaf(trained, lambda p: p.grad, state.trainable)
    assert grads.keys() == expected.keys()
    for path, grad in grads.items():
        assert difference("training: gradient, relative to its leaf", grad, expected[path], relative=True) < 1e-5, path
    norm = np.sqrt(sum(float((g**2).sum()) for g in expected.values()))
    assert difference("training: gradient norm, relative", metrics["grad_norm"], norm, relative=True) < 1e-5

    optimizer.step()
    for path, value in by_leaf(trained, lambda p: p, state.trainable).items():
        moved = tree.flat(state.trainable)[path]
        assert difference("training: weights after an SGD step", moved, value) < 1e-6, path


@tiny
@both
def test_five_adamw_steps_follow_torch(pair, tuning, tmp_path, difference):
    model, trained, variables, pattern = sides(pair, tuning, tmp_path)
    config = optim.Config(learning_rate=3e-3, schedule="constant", weight_decay=0.0, clip=1.0)
    weights = [p for p, _ in trained.values()]
    optimizer = torch.optim.AdamW(
        weights, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0
    )
    tx, _ = optim.build(config, steps=5)
    state, frozen = begin(variables, pattern, tx)
    step = make_step(objectives.supervised(pair.model), tx)
    losses = []
    for seed in range(5):
        tokens, alone = batch(seed % 2)  # two batches in turn, so that the loss falls
        optimizer.zero_grad()
        loss, _ = torch_loss(model, alone)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, config.clip).item()
        assert norm > config.clip  # else clipping would go untested
        optimizer.step()
        state, metrics = step(state, frozen, tokens)
        assert difference("training: losses of 5 AdamW steps", metrics["loss"], loss.item()) < 1e-4
        assert difference("training: norms of AdamW steps, relative", metrics["grad_norm"], norm, relative=True) < 1e-3
        losses.append(loss.item())
    assert losses[4] < losses[0] - 0.05
