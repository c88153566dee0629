"""Every kind of adapter, through PEFT's files both ways, merged, and trained beside PEFT's own."""

import dataclasses
import json
import re
import typing
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, lora, make_step, objectives, optim, tree, tuning
from jaxsft.hub import names
from jaxsft.hub.peft import config as peft_config
from jaxsft.hub.peft import names as peft_names
from jaxsft.lora import LoRA

from .pairs import documents, load_torch, ours, theirs, torch
from .test_parity_training import batch, begin, by_leaf, torch_loss

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT says what it does with tied and with saved embeddings; that is what we ask for.
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied|save_embedding_layers|no longer tied).*"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
]
PAIRS = ["llama-biases", "qwen3-tied", "gemma2-windows", "gemma2-untied"]
all_pairs = pytest.mark.parametrize("pair", PAIRS, indirect=True)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.stack(documents([24] * 2, seed=4))
BOTH = "embed|head|.*/(q|down)"

# name: (the adapter's shape, what trains of the base beside it)
OURS: dict[str, tuple[LoRA, list[str]]] = {
    "dora": (LoRA(4, 6.0, dora=True), []),
    "dora-rslora": (LoRA(4, 6.0, dora=True, rslora=True, targets=".*/(q|v|down)"), []),
    "pissa": (LoRA(4, 6.0, init="pissa"), []),
    "pissa-rslora": (LoRA(4, 6.0, init="pissa", rslora=True), []),
    "pissa-dora": (LoRA(4, 6.0, init="pissa", dora=True), []),
    "olora": (LoRA(4, 6.0, init="olora"), []),
    "patterns": (LoRA(4, 6.0, rank_pattern={".*/q": 2, ".*/mlp/.*": 7}, alpha_pattern={".*/(v|up)": 9.5}), []),
    "patterns-rslora": (LoRA(4, 6.0, rank_pattern={".*/q": 2}, alpha_pattern={".*/v": 9.5}, rslora=True), []),
    "embed": (LoRA(4, 6.0, targets="embed|.*/q"), []),
    "head": (LoRA(4, 6.0, targets="head|.*/q"), []),
    "both": (LoRA(4, 6.0, targets=BOTH), []),
    "both-dora": (LoRA(4, 6.0, targets=BOTH, dora=True), []),
    "both-pissa": (LoRA(4, 6.0, targets=BOTH, init="pissa"), []),
    "saved-table": (LoRA(4, 6.0), ["embed/table"]),
    "saved-norms": (LoRA(4, 6.0), ["norm/scale", ".*attn_norm/scale"]),
    "saved-kernel": (LoRA(4, 6.0, targets=".*/q"), ["blocks/[^/]+/mlp/up/kernel"]),
}


def noisy(leaf, key, size):
    return leaf + size * jax.random.normal(key, leaf.shape, jnp.float32)


def prepare(pair, spec: LoRA, patterns: list[str]):
    """(all variables, what trains) of a fresh adapter, everything that trains moved at random."""
    plan = tuning.plan(tuning.Config(lora=spec, trainable=patterns), pair.model.config.layers)
    variables = {"params": pair.params, "lora": lora.init(jax.random.key(1), pair.params, spec)}
    trains, rests = tree.partition(variables, plan.trainable)
    leaves = tree.flat(trains)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = {
        p: noisy(x, k, 0.1 if p.startswith("lora") else 0.05) for (p, x), k in zip(leaves.items(), keys, strict=True)
    }
    return tree.combine(tree.nest(moved), rests), tree.nest(moved)


def with_peft(pair, folder, **options):
    """The base with an adapter folder on it, every key of which must fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(pair.fresh(), str(folder), **options)
    assert not [w for w in caught if "adapter keys" in str(w.message)]  # missing or unexpected
    return model.eval()


def load(pair, folder):
    return hub.load_adapter(str(folder), pair.params, family=pair.family, config=pair.model.config)


@all_pairs
@pytest.mark.parametrize("kind", OURS)
def test_our_adapter_gives_the_same_logits_in_peft_merged_and_back(pair, kind, tmp_path, difference):
    spec, patterns = OURS[kind]
    variables, trains = prepare(pair, spec, patterns)
    low, saved = variables["lora"], trains.get("params", {})
    folder = tmp_path / "adapter"
    hub.export_adapter(str(folder), low, spec, trained=saved, family=pair.family, base=str(pair.folder))
    got = ours(pair.model, variables, TOKENS)
    expected = theirs(with_peft(pair, folder), TOKENS)
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.1
    assert difference("adapters: logits, ours in PEFT", got, expected) < 1e-4

    back = load(pair, folder)
    again = ours(pair.model, lora.attach(pair.params, back), TOKENS)
    assert difference("adapters: logits, ours loaded back", again, got) < 2e-5

    hub.merge(str(pair.folder), str(tmp_path / "merged"), adapter=low, trained=saved)
    merged = load_torch(tmp_path / "merged")
    assert difference("adapters: logits, merged, in transformers", theirs(merged, TOKENS), got) < 1e-4
    parted = pair.model.config.tied and kind.split("-")[0] in ("embed", "head", "both")
    assert merged.config.tie_word_embeddings == (pair.model.config.tied and not parted)
    folded = ours(pair.model, {"params": lora.merge(variables)}, TOKENS)
    assert difference("adapters: logits, merged here", folded, got) < 1e-4


SOME = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
    "alpha_pattern": {"layers.[02].*": 9, "up_proj": 3},
}
# Options of PEFT's LoraConfig.
THEIRS: dict[str, dict] = {
    "dora": {"use_dora": True},
    "dora-some-layers": {"use_dora": True, "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-dora-patterns": {"init_lora_weights": "pissa", "use_dora": True, **PATTERNS},
    "pissa-some-layers": {"init_lora_weights": "pissa", "layers_to_transform": [1], "layers_pattern": "layers"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica", "target_modules": SOME},
    "patterns": PATTERNS,
    "patterns-rslora": {**PATTERNS, "use_rslora": True},
    "pattern-from-the-start": {"rank_pattern": {"^model.layers.1.self_attn.k_proj": 1}},
    "embed": {"target_modules": ["embed_tokens", "q_proj"]},
    "embed-by-full-name": {"target_modules": ["model.embed_tokens", "model.layers.1.self_attn.q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "both-tied": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "ensure_weight_tying": True},
    "both-dora": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True},
    "embed-pissa": {"target_modules": ["embed_tokens", "up_proj"], "init_lora_weights": "pissa"},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "saved-in-one-layer": {"modules_to_save": ["layers.1.post_attention_layernorm"]},
    "saved-kernel": {"target_modules": SOME, "modules_to_save": ["k_proj"]},
    "saved-table-adapted-head": {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head", "q_proj"]},
    "bias-lora-only": {"target_modules": SOME, "bias": "lora_only"},
    "bias-all": {"target_modules": SOME, "bias": "all"},
}


def their_adapter(pair, **options):
    """A model of PEFT, everything that trains moved at random."""
    torch.manual_seed(5)
    options = {
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
        "target_modules": SEVEN,
    } | options
    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight += (0.1 if "lora_" in name else 0.05) * torch.randn(weight.shape)
    return model


def with_gaps(pair, kind: str, folder):
    """The pair itself, or for PiSSA one whose kernels have singular values that differ by 15%.

    Random ones have no gap between them, and then the space of the largest four is known to 1e-5 at best in float32:
    PEFT's own folder means another model on another machine.
    """
    if "pissa" not in kind:
        return pair
    theirs = pair.fresh()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("_proj.weight"):
                u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
                fall = 0.85 ** torch.arange(len(s), dtype=torch.float64)
                weight.copy_(u * (s.norm() / fall.norm() * fall) @ vt)
    theirs.save_pretrained(folder)
    model, params = hub.load(str(folder))
    return pair._replace(folder=folder, theirs=theirs, model=model, params=params)


@all_pairs
@pytest.mark.parametrize("kind", THEIRS)
def test_an_adapter_of_peft_gives_the_same_logits_here_and_merged(pair, kind, tmp_path, difference):
    pair = with_gaps(pair, kind, tmp_path / "base")
    model = their_adapter(pair, **THEIRS[kind])
    model.save_pretrained(str(tmp_path / "adapter"))
    expected = theirs(model, TOKENS)
    if "pissa" in kind or "olora" in kind:  # their base is changed when they load, and only then
        assert np.abs(theirs(with_peft(pair, tmp_path / "adapter"), TOKENS) - expected).max() < 1e-4
    assert np.abs(expected - theirs(pair.theirs, TOKENS)).max() > 0.1
    adapter = load(pair, tmp_path / "adapter")
    got = ours(pair.model, lora.attach(pair.params, adapter), TOKENS)
    assert difference("adapters: logits, PEFT's here", got, expected) < 1e-4

    read = hub.load_adapter(
        str(tmp_path / "adapter"), hub.on_disk(str(pair.folder)), family=pair.family, config=pair.model.config
    )
    hub.merge(str(pair.folder), str(tmp_path / "merged"), adapter=read.lora, trained=read.params)
    merged = theirs(load_torch(tmp_path / "merged"), TOKENS)
    assert difference("adapters: logits, PEFT's merged", merged, expected) < 1e-4

    hub.export_adapter(
        str(tmp_path / "again"), read.lora, read.spec, trained=read.params, family=pair.family, base=str(pair.folder)
    )
    again = theirs(with_peft(pair, tmp_path / "again"), TOKENS)
    assert difference("adapters: logits, PEFT's through here", again, expected) < 1e-4


# ---- what is refused ---------------------------------------------------------------------------------------------

# Every other key of PEFT's configuration, at a value that PEFT accepts.
REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": [7, 8],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 2], [1, 3]],
    "lora_bias": True,
    "monteclora_config": {"num_samples": 4},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
}


def test_every_key_of_peft_is_read_changes_nothing_or_is_refused():
    """A key that a new PEFT has belongs to one of the three: then say which."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == peft_config.READ | peft_config.NEUTRAL | set(REFUSED)
    assert not peft_config.READ & peft_config.NEUTRAL
    assert not set(REFUSED) & (peft_config.READ | peft_config.NEUTRAL)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_supported_is_refused_by_name(pairs, key, tmp_path):
    pair = pairs("llama-biases")
    their_adapter(pair).save_pretrained(str(tmp_path))
    load(pair, tmp_path)
    file = tmp_path / peft_names.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(hub.CheckpointError, match=f"sets '{key}' to .*, which is not supported"):
        load(pair, tmp_path)


STARTS = {"corda", "loftq", "lora_ga", "pissa_niter_4"}


@pytest.mark.parametrize("start", sorted(STARTS))
def test_a_start_that_changes_the_base_beyond_recall_is_refused_with_the_remedy(pairs, start, tmp_path):
    pair = pairs("llama-biases")
    their_adapter(pair, init_lora_weights=start if start.startswith("pissa") else True).save_pretrained(str(tmp_path))
    file = tmp_path / peft_names.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(
        hub.CheckpointError, match=f"'init_lora_weights' to '{start}'.*path_initial_model_for_weight_co"
    ):
        load(pair, tmp_path)


def test_every_start_of_peft_is_known():
    said = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    values = {value for part in typing.get_args(said) for value in typing.get_args(part) or [part]} - {bool}
    known = {value for value in peft_config.PLAIN if isinstance(value, str)} | set(lora.STARTS) | STARTS
    assert values - {"pissa_niter_[number of iters]"} <= known


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_folder_that_peft_converted_is_a_plain_one(pairs, start, tmp_path, difference):
    """The remedy of those messages: save the start, then save with its path."""
    pair = pairs("llama-biases")
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": SEVEN, "init_lora_weights": start}
    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**options)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape)
    expected = theirs(model, TOKENS)
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    adapter = load(pair, tmp_path / "plain")
    assert (adapter.spec.rank, adapter.spec.init) == (8, "lora")
    got = ours(pair.model, lora.attach(pair.params, adapter), TOKENS)
    assert difference("adapters: logits, converted by PEFT", got, expected) < 1e-4


@pytest.mark.parametrize("pair", ["llama-biases", "gemma2-windows"], indirect=True)
def test_a_weighted_sum_is_that_of_peft(pair, tmp_path, difference):
    options = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(6)
    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(target_modules=SEVEN, **options), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(target_modules=SOME, **options | {"r": 2, "use_rslora": True}))
    model.save_pretrained(str(tmp_path))
    weights = [0.7, -0.4]
    model.add_weighted_adapter(["one", "two"], weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    expected = theirs(model.eval(), TOKENS)
    parts = [(load(pair, tmp_path / name).lora, weight) for name, weight in zip(("one", "two"), weights, strict=True)]
    summed = lora.weighted(parts)
    got = ours(pair.model, {"params": pair.params, "lora": summed}, TOKENS)
    assert difference("adapters: logits, weighted sum", got, expected) < 1e-4
    hub.export_adapter(str(tmp_path / "sum"), summed, LoRA(), family=pair.family, base=str(pair.folder))
    again = theirs(with_peft(pair, tmp_path / "sum"), TOKENS)
    assert difference("adapters: logits, weighted sum in PEFT", again, expected) < 1e-4


# ---- training ----------------------------------------------------------------------------------------------------


def trained_of(pair, model) -> dict[names.Address, tuple]:
    """What trains in a model of PEFT, by our address: (parameter, whether it is transposed)."""
    places, found = names.places(pair.family, pair.model.config), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            plain = plain.replace("magnitude_vector.weight", "magnitude_vector")
            module, part = peft_names.NAME.fullmatch(plain).groups()
            place = places[f"{module}.{'bias' if part.endswith('bias') else 'weight'}"]
            path, kind = place.address.path, peft_names.PARTS.get(part)
            path = f"{path.rpartition('/')[0]}/{kind}" if kind else path
            turned = kind in ("a", "b") if kind else place.transposed
            found[names.Address(path, place.address.layer)] = parameter, turned
    return found


def train_both(pair, model, folder, optimizer, config: optim.Config, difference, what: str, steps: int = 5):
    """Trains PEFT's model, and the same from its folder here, on the same batches; compares losses and weights."""
    model.save_pretrained(str(folder))
    adapter, trained = load(pair, folder), trained_of(pair, model)
    pattern = [lora.TRAINABLE] + [f"params/{re.escape(path)}" for path in tree.flat(adapter.params)]
    tx, _ = optim.build(config, steps=steps)
    state, frozen = begin(jax.tree.map(jnp.asarray, lora.attach(pair.params, adapter)), pattern, tx)
    step = make_step(objectives.supervised(pair.model), tx)
    for seed in range(steps):
        tokens, alone = batch(seed % 2)
        optimizer.zero_grad()
        loss, _ = torch_loss(model, alone)
        loss.backward()
        optimizer.step()
        state, metrics = step(state, frozen, tokens)
        assert difference(f"adapters: losses, {what}", metrics["loss"], loss.item()) < 1e-5
    leaves, expected = tree.flat(state.trainable), by_leaf(trained, lambda p: p, state.trainable)
    assert sum(x.size for x in leaves.values()) == sum(p.numel() for p, _ in trained.values())
    for path, leaf in leaves.items():
        assert difference(f"adapters: weights, {what}", leaf, expected[path]) < 1e-5, path


TRAINED = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True, "target_modules": SOME},
    "both-dora": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True},
    "both": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "saved": {"modules_to_save": ["embed_tokens", "norm"], "ensure_weight_tying": True, "target_modules": SOME},
}


@pytest.mark.parametrize("pair", ["llama-biases", "gemma2-windows"], indirect=True)
@pytest.mark.parametrize("kind", TRAINED)
def test_five_adamw_steps_follow_peft(pair, kind, tmp_path, difference):
    pair = with_gaps(pair, kind, tmp_path / "base")
    model = their_adapter(pair, lora_dropout=0.0, **TRAINED[kind])
    rate = 1e-3
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    config = optim.Config(learning_rate=rate, schedule="constant", clip=0.0)
    train_both(pair, model, tmp_path / "adapter", optimizer, config, difference, kind)


@pytest.mark.parametrize("pair", ["llama-biases", "qwen3-tied"], indirect=True)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_plus_follows_pefts_optimizer(pair, dora, tmp_path, difference):
    """Which parameters learn faster and which decay: A, B, m, an adapted embedding and biases."""
    options = {"use_dora": dora, "target_modules": [*SOME, "embed_tokens"], "bias": "lora_only"}
    model = their_adapter(pair, lora_dropout=0.0, **options)
    from peft.optimizers import create_loraplus_optimizer

    rate, decay = 2e-4, 0.3
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=rate,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=rate,
        loraplus_weight_decay=decay,
    )
    config = optim.Config(learning_rate=rate, schedule="constant", clip=0.0, lora_plus=16.0, weight_decay=decay)
    train_both(pair, model, tmp_path / "adapter", optimizer, config, difference, "LoRA+")
