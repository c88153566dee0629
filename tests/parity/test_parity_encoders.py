"""Encoders give transformers' logits, hidden states, losses and gradients; what they leave is what it and PEFT read."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import hub, lora, losses, make_step, models, objectives, train, tree
from jaxsft.hub import names
from jaxsft.hub.files import Reader
from jaxsft.lora import LoRA
from jaxsft.objectives.masked import _sum
from jaxsft.types import Tokens

from .pairs import ENCODERS, VOCAB, pack, random_adapter, torch, transformers

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
HEADED = [name for name, (kind, _) in ENCODERS.items() if not kind.endswith("Model")]
every = pytest.mark.parametrize("pair", ENCODERS, indirect=True)
headed = pytest.mark.parametrize("pair", HEADED, indirect=True)
some = pytest.mark.parametrize(
    "pair", ["bert-masked", "bert-pretraining", "bert-base", "roberta-masked", "roberta-base"], indirect=True
)

T = 160  # more than one block of queries, see models.attention.BLOCK
LEAST = 4  # of token ids: those below may be padding, which RoBERTa counts no position for
SHARD = 4e-5  # GB: several shards of even these models


def documents(lengths, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(LEAST, VOCAB, n, dtype=np.int32) for n in lengths]


@functools.partial(jax.jit, static_argnums=0)
def ours(model, variables, tokens, positions=None, segments=None):
    """Scores [B, T, V], or the last hidden states [B, T, D] of an encoder without a head, in float32."""
    features = model.features(variables, tokens, positions, segments)
    return models.logits(model, variables, features) if model.config.mlm else features.astype(jnp.float32)


def outcome(out):
    names_ = ("logits", "prediction_logits", "last_hidden_state")
    return next(getattr(out, name) for name in names_ if getattr(out, name, None) is not None)


def theirs(model, tokens, seen=None) -> np.ndarray:
    """The same of a torch model; where a row is not `seen` it holds padding."""
    mask = None if seen is None else torch.tensor(seen)
    tokens = tokens if seen is None else np.where(seen, tokens, model.config.pad_token_id)
    with torch.no_grad():
        return outcome(model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask)).float().numpy()


def load_torch(folder, pair, dtype: str = "auto"):
    """Reads a checkpoint with transformers and insists that it is complete."""
    kind = getattr(transformers, ENCODERS[pair.name][0])
    model, info = kind.from_pretrained(str(folder), output_loading_info=True, attn_implementation="eager", dtype=dtype)
    assert not any(info.values()), info
    return model.eval()


def same_weights(left, right) -> None:
    """Bit for bit, and the same names."""
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


def raw(folder) -> dict[str, tuple]:
    """Every tensor of a folder as dtype, shape and bytes."""
    reader = Reader(folder)
    return {n: (reader.dtype(n), reader.shape(n), reader.read(n).tobytes()) for n in reader.files}


# ---- what it computes -----------------------------------------------------------------------------------------------


@every
def test_scores_or_hidden_states_are_those_of_torch(pair, difference):
    tokens = np.stack(documents([T] * 4))
    expected = theirs(pair.theirs, tokens)
    assert expected.std() > 0.5  # else an absolute tolerance would say nothing
    got = ours(pair.model, {"params": pair.params}, tokens)
    assert difference("encoders, float32", got, expected) < 1e-4


@every
def test_right_padding_changes_no_real_token(pair, difference):
    packed = pack([[row] for row in documents([T, 131, 40, 3], seed=1)], T)
    real = packed.segments > 0
    expected = theirs(pair.theirs, packed.tokens, real)
    got = ours(pair.model, {"params": pair.params}, packed.tokens, packed.positions, packed.segments)
    assert difference("encoders, float32, right-padded", got[real], expected[real]) < 1e-4


@every
def test_a_packed_document_reads_as_it_does_alone(pair, difference):
    a, b, c, d, e, f, g, h = documents([T, 80, 80, 100, 50, 3, 1, 140], seed=2)
    packed = pack([[a], [b, c], [d, e], [f, g, h]], T)
    got = ours(pair.model, {"params": pair.params}, packed.tokens, packed.positions, packed.segments)
    for (row, columns), document in zip(packed.places, [a, b, c, d, e, f, g, h], strict=True):
        alone = theirs(pair.theirs, document[None])[0]
        assert difference("encoders, float32, packed", got[row, columns], alone) < 1e-4


@every
def test_bfloat16_is_no_further_from_float32_than_torch_in_bfloat16(pair, difference):
    tokens = np.stack(documents([T] * 4))
    full = theirs(pair.theirs, tokens)
    rms = lambda x: float(np.sqrt(np.mean((np.asarray(x, np.float64) - full) ** 2)))
    model, params = hub.load(str(pair.folder), dtype=jnp.bfloat16)
    error = rms(ours(model, {"params": params}, tokens))
    allowed = rms(theirs(load_torch(pair.folder, pair, "bfloat16"), tokens))
    difference("encoders, bfloat16: our rms error over torch's", error / allowed, 0.0)
    assert error < 2 * allowed


@headed
def test_without_its_head_an_encoder_gives_the_hidden_states(pair, difference):
    bare = models.build(pair.model.config.__class__(**{**vars(pair.model.config), "mlm": False}))
    tokens = np.stack(documents([T] * 2))
    base = getattr(pair.theirs, pair.theirs.base_model_prefix)
    got = ours(bare, {"params": pair.params}, tokens)
    assert difference("encoders, float32, hidden states under a head", got, theirs(base, tokens)) < 1e-4


@every
def test_every_position_that_there_is_can_be_used(pair, difference):
    longest = pair.model.config.max_position
    assert longest == 258 - pair.model.config.first_position
    tokens = np.stack(documents([longest], seed=3))
    got = ours(pair.model, {"params": pair.params}, tokens)
    assert difference("encoders, float32, all positions", got, theirs(pair.theirs, tokens)) < 1e-4
    with pytest.raises((IndexError, RuntimeError)):  # transformers, too, ends there
        theirs(pair.theirs, np.stack(documents([longest + 1])))


# ---- what it leaves -------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_gb", [5.0, SHARD], ids=["one-file", "shards"])
def test_an_export_loads_in_transformers_with_every_weight(pair, dtype, shard_gb, tmp_path):
    files = hub.export(str(tmp_path), pair.params, source=str(pair.folder), shard_gb=shard_gb, dtype=dtype)
    assert (len(files) > 1) == (shard_gb == SHARD)
    same_weights(load_torch(tmp_path, pair), load_torch(pair.folder, pair, dtype))


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_untouched_merge_is_the_base_byte_for_byte(pair, dtype, tmp_path):
    base = tmp_path / "base"
    pair.fresh().to(getattr(torch, dtype)).save_pretrained(base, max_shard_size="30KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    hub.merge(str(base), str(tmp_path / "one"))
    hub.merge(str(base), str(tmp_path / "many"), shard_gb=SHARD)
    assert raw(tmp_path / "one") == raw(tmp_path / "many") == raw(base)
    same_weights(load_torch(tmp_path / "many", pair), load_torch(base, pair))


@pytest.mark.parametrize("pair", ["bert-masked", "roberta-masked"], indirect=True)
def test_the_base_model_of_a_checkpoint_with_a_head_reads_and_merges_without_it(pair, tmp_path, difference):
    base = getattr(pair.fresh(), pair.theirs.base_model_prefix)
    base.save_pretrained(tmp_path / "base")
    model, params = hub.load(str(tmp_path / "base"))
    tokens = np.stack(documents([24] * 2, seed=4))
    assert (
        difference("encoders, float32, saved base", ours(model, {"params": params}, tokens), theirs(base, tokens))
        < 1e-4
    )
    hub.merge(str(tmp_path / "base"), str(tmp_path / "merged"))
    assert raw(tmp_path / "merged") == raw(tmp_path / "base")


TOKENS = np.stack(documents([24] * 2, seed=4))
SPEC = LoRA(rank=4, alpha=6.0)
LINEAR = ["query", "key", "value", "dense"]


def our_adapter(pair):
    return random_adapter(jax.random.key(2), lora.init(jax.random.key(1), pair.params, SPEC), 0.15)


def with_peft(pair, folder):
    """The base with an adapter folder on it, every key of which must fit (a warning is an error)."""
    return peft.PeftModel.from_pretrained(pair.fresh(), str(folder)).eval()


@some
def test_our_adapter_gives_the_same_in_peft_and_merged(pair, tmp_path, difference):
    adapter = our_adapter(pair)
    given = {"family": pair.family, "base": str(pair.folder), "config": pair.model.config}
    hub.export_adapter(str(tmp_path / "adapter"), adapter, SPEC, **given)
    expected = theirs(with_peft(pair, tmp_path / "adapter"), TOKENS)
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.5
    got = ours(pair.model, {"params": pair.params, "lora": adapter}, TOKENS)
    assert difference("encoders, our adapter in PEFT", got, expected) < 1e-4
    hub.merge(str(pair.folder), str(tmp_path / "merged"), adapter=adapter)
    merged = theirs(load_torch(tmp_path / "merged", pair), TOKENS)
    assert difference("encoders, merged against adapter", merged, got) < 1e-4


@some
def test_an_adapter_of_peft_gives_the_same_here(pair, tmp_path, difference):
    torch.manual_seed(5)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=LINEAR, exclude_modules=r".*(pooler|cls|lm_head).*"
    )
    model = peft.get_peft_model(pair.fresh(), config).eval()
    model.save_pretrained(str(tmp_path))
    expected = theirs(model, TOKENS)
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.1
    adapter, spec, _ = hub.load_adapter(str(tmp_path), pair.params, family=pair.family, config=pair.model.config)
    assert (spec.rank, spec.alpha) == (4, 6.0)
    got = ours(pair.model, {"params": pair.params, "lora": adapter}, TOKENS)
    assert difference("encoders, PEFT's adapter here", got, expected) < 1e-4


# ---- what it learns -------------------------------------------------------------------------------------------------

MASK = 2
masked = functools.partial(objectives.masked, mask_id=MASK, ordinary=np.arange(LEAST, VOCAB), rate=0.3)


def batch(seed: int = 7) -> Tokens:
    """Rows of one or two documents with padding; the mask marks what may be hidden."""
    docs = documents([30, 17, 9, 21, 4, 12], seed)
    rows = pack([docs[:1], docs[1:3], docs[3:5], docs[5:]], 32)
    mask = (rows.segments > 0) & (np.random.default_rng(seed).random(rows.tokens.shape) < 0.9)
    return Tokens(*map(jnp.asarray, (rows.tokens, mask, rows.positions, rows.segments)))


def torch_loss(model, tokens: Tokens, key):
    """Transformers' own loss of the same hidden tokens, the documents of a row one by one."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.split(key)[0], _sum(tokens.tokens))
    hide = functools.partial(losses.mask_tokens, mask_id=MASK, ordinary=jnp.arange(LEAST, VOCAB), rate=0.3)
    given, chosen = jax.vmap(hide)(keys, tokens.tokens, tokens.mask)
    total, count = 0.0, int(chosen.sum())
    for row in range(len(given)):
        for number in range(1, int(tokens.segments[row].max()) + 1):
            here = np.asarray(tokens.segments[row] == number)
            labels = torch.tensor(np.where(chosen[row], tokens.tokens[row], -100)[here][None], dtype=torch.long)
            read = torch.tensor(np.asarray(given[row])[here][None], dtype=torch.long)
            if (labels >= 0).any():
                total += model(read, labels=labels).loss * (labels >= 0).sum()
    return total / count, count


def by_leaf(pair, parameters, like) -> dict[str, np.ndarray]:
    """Torch's arrays in the leaves of our tree."""
    places, leaves = names.places(pair.family, pair.model.config), {}
    found = {places[name].address: (x, places[name].transposed) for name, x in parameters.items() if name in places}
    for path in tree.flat(like):
        plain, layers = names.unstacked(path)
        parts = [found[names.Address(plain, layer)] for layer in layers or [None]]
        values = [x.detach().numpy().T if turned else x.detach().numpy() for x, turned in parts]
        leaves[path] = values[0] if layers is None else np.stack(values)
    return leaves


@pytest.mark.parametrize("pair", ["bert-masked", "bert-masked-gelu-new", "roberta-masked"], indirect=True)
def test_one_sgd_step_has_the_loss_and_gradients_of_torch(pair, difference):
    model, rate, tokens = pair.fresh(), 0.05, batch()
    state = train.init({"params": jax.tree.map(jnp.copy, pair.params)}, (tx := optax.sgd(rate, 0.9)), jax.random.key(0))
    loss, count = torch_loss(model, tokens, jax.random.fold_in(state.key, 0))
    loss.backward()
    step = make_step(masked(pair.model), tx)
    state, metrics = step(state, {}, tokens)
    assert int(metrics["trained_tokens"]) == count > 10
    assert difference("encoders, training: loss, relative", metrics["loss"], loss.item(), relative=True) < 1e-5
    grads = tree.flat(state.opt_state[0].trace["params"])
    expected = by_leaf(pair, {name: p.grad for name, p in model.named_parameters()}, pair.params)
    assert grads.keys() == expected.keys()
    # A key's bias moves all scores of a query alike and changes nothing: on both sides its gradient is rounding alone.
    for path in [path for path in grads if not path.endswith("attn/k/bias")]:
        value = difference(
            "encoders, training: gradient, relative to its leaf", grads[path], expected[path], relative=True
        )
        assert value < 1e-5, path


@pytest.mark.parametrize("pair", ["bert-masked", "roberta-masked"], indirect=True)
def test_what_training_leaves_gives_the_same_scores_in_transformers(pair, tmp_path, difference):
    tx = optax.adamw(3e-3)
    state = train.init({"params": jax.tree.map(jnp.copy, pair.params)}, tx, jax.random.key(0))
    step, found = make_step(masked(pair.model), tx), []
    for _ in range(20):
        state, metrics = step(state, {}, batch())
        found.append(float(metrics["loss"]))
    assert np.mean(found[-5:]) < np.mean(found[:5]) - 0.5
    trained = state.trainable["params"]
    hub.merge(str(pair.folder), str(tmp_path / "merged"), trained=trained)
    got = theirs(load_torch(tmp_path / "merged", pair), TOKENS)
    assert np.abs(got - theirs(pair.theirs, TOKENS)).max() > 0.1
    assert difference("encoders, after training", got, ours(pair.model, {"params": trained}, TOKENS)) < 1e-4


def test_the_copies_of_a_pair_are_apart(pairs):
    """`fresh` and training above must not have changed what other tests read."""
    pair = pairs("bert-masked")
    same_weights(copy.deepcopy(pair.theirs), load_torch(pair.folder, pair))
