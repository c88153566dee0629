import dataclasses

import jax
import numpy as np
import pytest

from jaxsft import hub, lora, models, optim, train, tree
from jaxsft.hub import CheckpointError, Vocabulary
from jaxsft.hub.peft.names import CONFIG, FILE, PICKLE
from jaxsft.lora import LoRA
from jaxsft.models.adapter import project

from .conftest import FAMILY, PREFIX, SPEC, change, load, random, rewrite, same


@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_adapter_comes_back_as_it_was_exported(tiny, tmp_path, family):
    shape = hub.read_config(tiny(family))[1]
    params, spec, own = hub.shapes(shape), LoRA(rank=2, alpha=3.0), models.FAMILIES[family]
    if family == "gpt_oss":
        with pytest.raises(hub.CheckpointError, match="holds all experts in one tensor"):
            hub.export_adapter(str(tmp_path), random(params, spec), spec, family=own, base="x")
        spec = LoRA(rank=2, alpha=3.0, targets=".*/attn/.*")
    adapter = random(params, spec)
    hub.export_adapter(str(tmp_path), adapter, spec, family=own, base="x")
    back = hub.load_adapter(str(tmp_path), params, family=own, config=shape)
    same(back.lora, adapter)
    assert (back.spec, back.params) == (LoRA(rank=2, alpha=3.0), {})


def test_layers_that_a_file_leaves_out_get_a_zero_adapter(folder, adapter, params, config):
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name or ".layers.3." in name])
    back = tree.flat(load(folder, params, config).lora)
    for path, leaf in tree.flat(adapter).items():
        for layer in range(4):
            kept = layer in (0, 2) or path.endswith("/scale")
            np.testing.assert_array_equal(back[path][layer], leaf[layer] if kept else np.zeros_like(leaf[layer]))


def test_an_adapter_lands_in_the_stacks_of_a_cut_model(folder, adapter, params, config):
    cut = jax.eval_shape(lambda p: models.split(p, 1), params)
    back = load(folder, cut, config).lora
    assert list(back["blocks"]) == ["0-0", "1-3"]
    same({"blocks": back["blocks"]}, {"blocks": models.split({"blocks": adapter["blocks"]}, 1)["blocks"]})


Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def rename(t, old, new):
    t[new] = t.pop(old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.update({f"{Q1}.lora_A.weight": np.zeros((4, 32), np.float32)}),
            r"'base_model.*q_proj.lora_A.weight' in .* has shape \(4, 32\); \(3, 32\) was expected",
        ),
        (
            lambda t: t.update({f"{Q1}.lora_B.weight": np.zeros((3, 32), np.float32)}),
            r"lora_B.weight' in .* has shape \(3, 32\); \(32, 3\) was expected",
        ),
        (lambda t: t[f"{Q1}.lora_B.weight"].fill(np.nan), "lora_B.weight' in .* holds NaN or infinite numbers"),
        (
            lambda t: rename(t, f"{Q1}.lora_A.weight", f"{Q1.replace('1', '7')}.lora_A.weight"),
            r"layers.7.self_attn.q_proj.lora_A.weight', which fits no kernel of the base",
        ),
        (
            lambda t: rename(t, f"{Q1}.lora_A.weight", f"{Q1}.lora_magnitude_vector"),
            r"lora_magnitude_vector' in .* has shape \(3, 32\); \(32,\) was expected",
        ),
        (
            lambda t: t.update({f"{Q1}.lora_magnitude_vector": np.ones(32, np.float32)}),
            r"has model.layers.1.self_attn.q_proj.lora_magnitude_vector, but adapter_config.json does not set use_dora",
        ),
        (
            lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_A.weight": np.zeros((3, 96), np.float32)}),
            "model.embed_tokens.lora_A.weight', which fits no kernel of the base",  # an embedding's has another name
        ),
        (
            lambda t: t.update({f"{Q1}.base_layer.weight": np.zeros((32, 32), np.float32)}),
            "q_proj.base_layer.weight', which fits no kernel of the base",
        ),
        (
            lambda t: t.update({f"{PREFIX}model.norm.weight": np.zeros(33, np.float32)}),
            r"model.norm.weight' in .* has shape \(33,\); \(32,\) was expected",
        ),
        (lambda t: t.update(x=np.zeros(3, np.float32)), "has 'x', which fits no kernel of the base"),
        (lambda t: [t.pop(name) for name in list(t) if "q_proj.lora_B" in name], "lacks a half of .*q"),
        (lambda t: [t.pop(name) for name in list(t) if "q_proj.lora_A" in name], "lacks a half of .*q"),
        (lambda t: t.pop(f"{Q1}.lora_A.weight"), "lacks a half of"),
        (lambda t: t.pop(f"{Q1}.lora_B.weight"), "lacks a half of"),
        (lambda t: t.clear(), "lacks a half of everything"),
    ],
)
def test_a_tensor_that_is_wrong_or_missing_is_refused(folder, params, config, spoil, message):
    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=message):
        load(folder, params, config)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_rank_in_the_config_that_is_not_the_files_is_refused(folder, params, config, rank):
    change(folder, r=rank)
    with pytest.raises(CheckpointError, match=r"has shape .* was expected"):
        load(folder, params, config)


def test_an_adapter_of_a_wider_model_is_refused(tiny, folder):
    wide = hub.read_config(tiny("llama", hidden_size=64, head_dim=8))[1]
    with pytest.raises(CheckpointError, match=r"lora_[AB].weight' in .* has shape .*; .* was expected"):
        load(folder, hub.shapes(wide), wide)


def test_folders_that_hold_no_adapter_are_refused(folder, params, config, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter folder '.*none'; give one with adapter_config.json and"):
        load(tmp_path / "none", params, config)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="has neither adapter_model.safetensors"):
        load(folder, params, config)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        load(folder, params, config)
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / PICKLE).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"has adapter_model.bin, a pickle.*let save_pretrained write adapter_mod"
    ):
        load(folder, params, config)


# ---- kinds -------------------------------------------------------------------------------------------------------

EVERY = ".*/(q|v|down)|embed|head"
KINDS = {
    "dora": LoRA(rank=3, alpha=6.0, dora=True, targets=EVERY),
    "patterns": LoRA(3, 6.0, rank_pattern={".*/q": 2, "head": 1}, alpha_pattern={".*/v": 9.0}, targets=EVERY),
    "pissa": LoRA(rank=3, alpha=6.0, init="pissa", targets=EVERY),
    "olora-dora": LoRA(rank=3, alpha=6.0, init="olora", dora=True, rslora=True, targets=EVERY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_the_same_change_of_the_weights(kind, base, weights, config, tmp_path):
    spec = KINDS[kind]
    adapter = random(weights, spec)
    hub.export_adapter(str(tmp_path), adapter, spec, family=FAMILY, base=str(base))
    back = load(tmp_path, weights, config)
    assert (back.spec.dora, back.spec.rslora, back.params) == (spec.dora, spec.rslora, {})
    found = lora.layers(back.lora)
    for layer, leaves in lora.layers(adapter).items():
        kernel = np.asarray(lora.matrix(weights, layer))
        changed = lora.adapted(kernel, leaves)
        assert np.abs(changed - kernel).max() > 0.5
        np.testing.assert_allclose(lora.adapted(kernel, found[layer]), changed, atol=2e-4, err_msg=layer)
        if spec.init == "lora":
            same(found[layer], leaves)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_folder_over_a_changed_base_loads_over_the_original_one(start, folder, adapter, params, weights, config):
    """PEFT's own folders of PiSSA and OLoRA: W is W - scale A0 B0 there, with A0 and B0 from W."""
    change(folder, init_lora_weights=start)
    found = load(folder, weights, config)
    assert found.spec.init == start
    for layer, leaves in lora.layers(found.lora).items():
        kernel, plain = np.asarray(lora.matrix(weights, layer), np.float64), lora.layers(adapter)[layer]
        same({name: leaves[name] for name in plain}, plain)
        for row in range(4):
            if start == "pissa":
                u, s, vt = np.linalg.svd(kernel[row], full_matrices=False)
                expected = (u[:, :3] * s[:3]) @ vt[:3]
            else:
                q, r = np.linalg.qr(kernel[row].T)
                expected = leaves["scale"][row] * (q[:, :3] @ r[:3]).T
            subtracted = leaves["scale"][row] * leaves["a0"][row] @ leaves["b0"][row]
            np.testing.assert_allclose(subtracted, expected, atol=1e-3 if start == "pissa" else 1e-4)
    with pytest.raises(CheckpointError, match=rf"needs .* of the base for what {start} started at; give .*hub.on_disk"):
        load(folder, params, config)


def test_ranks_that_differ_in_a_stack_are_padded_with_zeros_that_never_move(folder, params, config):
    change(folder, rank_pattern={"layers.1.*": 2, "layers.2.self_attn.q_proj": 5}, alpha_pattern={"layers.3.*": 1})
    draw = np.random.default_rng(5)

    def resize(tensors):
        for name, x in list(tensors.items()):
            rank = 2 if ".layers.1." in name else 5 if "layers.2.self_attn.q_proj" in name else 3
            shape = (rank, x.shape[1]) if "lora_A" in name else (x.shape[0], rank)
            tensors[name] = draw.normal(size=shape).astype(np.float32)

    rewrite(folder, resize)
    adapter = load(folder, params, config).lora
    q, v = (adapter["blocks"]["0-3"]["attn"][name] for name in "qv")
    ranks = {"q": (3, 2, 5, 3), "v": (3, 2, 3, 3)}
    for name, leaves, widest in (("q", q, 5), ("v", v, 3)):
        assert leaves["a"].shape[-1] == leaves["b"].shape[-2] == widest
        for layer, rank in enumerate(ranks[name]):
            alpha = 1 if layer == 3 else 12
            np.testing.assert_allclose(leaves["scale"][layer], alpha / np.sqrt(rank), rtol=1e-6)
            assert np.all(leaves["a"][layer, :, :rank] != 0)
            assert not leaves["a"][layer, :, rank:].any()
            assert not leaves["b"][layer, rank:].any()

    # Three steps of AdamW with decay on some loss of x W + scale (x A) B.
    tx, _ = optim.build(optim.Config(learning_rate=0.1, weight_decay=0.1), 3)
    x, kernel = draw.normal(size=(4, 6, 32)).astype(np.float32), np.zeros((4, 32, 32), np.float32)
    loss = lambda low, scale: (project(x, kernel, {**low, "scale": scale}) ** 2).mean()
    low = {name: jax.numpy.asarray(q[name]) for name in "ab"}
    state = train.init(low, tx, jax.random.key(0))
    for _ in range(3):
        grads = jax.grad(loss)(low, q["scale"])
        updates, opt_state = tx.update(grads, state.opt_state, low)
        low, state = jax.tree.map(jax.numpy.add, low, updates), state._replace(opt_state=opt_state)
    for layer, rank in enumerate(ranks["q"]):
        assert not low["a"][layer, :, rank:].any()
        assert not low["b"][layer, rank:].any()
        assert np.all(low["a"][layer, :, :rank] != q["a"][layer, :, :rank])
        assert np.all(low["b"][layer, :rank] != q["b"][layer, :rank])


def test_a_dora_of_some_layers_leaves_the_others_as_they_are(weights, params, config, tmp_path):
    spec = LoRA(rank=2, dora=True, targets=".*/q")
    hub.export_adapter(str(tmp_path), random(weights, spec), spec, family=FAMILY, base="x")
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name])
    leaves = lora.layers(load(tmp_path, weights, config).lora)["blocks/0-3/attn/q"]
    kernel = np.asarray(weights["blocks"]["0-3"]["attn"]["q"]["kernel"])
    np.testing.assert_allclose(lora.adapted(kernel, leaves)[1], kernel[1], rtol=1e-5)
    with pytest.raises(CheckpointError, match="needs .*attn/q/kernel of the base for a layer without an adapter"):
        load(tmp_path, params, config)
    rewrite(tmp_path, lambda t: t.pop(f"{PREFIX}model.layers.2.self_attn.q_proj.lora_magnitude_vector"))
    with pytest.raises(
        CheckpointError, match=r"lacks lora_magnitude_vector of model.layers.2.self_attn.q_proj, though"
    ):
        load(tmp_path, weights, config)


# ---- weights that trained beside the adapter ---------------------------------------------------------------------


def save(folder, config_keys, **tensors):
    """Adds whole weights to a folder, as PEFT does."""
    change(folder, **config_keys)
    rewrite(folder, lambda t: t.update({PREFIX + name: x for name, x in tensors.items()}))


def test_saved_modules_come_back_as_whole_leaves(folder, params, weights, config):
    ones = np.ones(32, np.float32)
    save(folder, {"modules_to_save": ["model.norm", "layers.1.input_layernorm"], "bias": "all"}, **{
        "model.norm.weight": 2 * ones,
        "model.layers.1.input_layernorm.weight": 3 * ones,
        "model.layers.2.self_attn.q_proj.base_layer.bias": 4 * ones,
        "model.layers.0.self_attn.o_proj.bias": 5 * ones,
    })  # fmt: skip
    stack = weights["blocks"]["0-3"]
    expected = {
        "norm/scale": 2 * ones,
        "blocks/0-3/attn_norm/scale": np.asarray(stack["attn_norm"]["scale"]).copy(),
        "blocks/0-3/attn/q/bias": np.asarray(stack["attn"]["q"]["bias"]).copy(),
        "blocks/0-3/attn/o/bias": np.asarray(stack["attn"]["o"]["bias"]).copy(),
    }
    expected["blocks/0-3/attn_norm/scale"][1] = 3
    expected["blocks/0-3/attn/q/bias"][2] = 4
    expected["blocks/0-3/attn/o/bias"][0] = 5
    same(load(folder, weights, config).params, tree.nest(expected))
    with pytest.raises(CheckpointError, match="needs .* of the base for layers that are not saved; give"):
        load(folder, params, config)


WEIGHT = np.arange(32, dtype=np.float32)[None]
# As PEFT writes them, as TRL has them written, and as ours are.
JUDGES = [["classifier", "score"], ["score", "classifier", "score"], ["score"]]


@pytest.mark.parametrize("modules", JUDGES)
def test_the_adapter_of_a_reward_model_brings_its_score_over_either_base(folder, adapter, params, config, modules):
    save(folder, {"task_type": "SEQ_CLS", "modules_to_save": modules}, **{"score.weight": WEIGHT})
    judge = {name: part for name, part in params.items() if name != "head"}
    judge |= {"score": {"kernel": jax.ShapeDtypeStruct((32, 1), np.float32)}}
    for base, shape in ((params, config), (judge, config), (judge, models.with_labels(FAMILY, config, 1))):
        found = load(folder, base, shape)
        same(found.lora, adapter)
        same(found.params, {"score": {"kernel": WEIGHT.T}})


def test_a_tied_output_layer_does_not_follow_the_embedding_where_there_is_a_score(tied, adapter, tmp_path):
    table, (family, config) = np.ones((96, 32), np.float32), hub.read_config(tied)
    hub.export_adapter(
        str(tmp_path), adapter, SPEC, family=family, base=str(tied), trained={"score": {"kernel": WEIGHT.T}}
    )
    save(tmp_path, {"modules_to_save": ["embed_tokens", "score"]}, **{"model.embed_tokens.weight": table})
    same(load(tmp_path, hub.on_disk(str(tied)), config).params, {"embed/table": table, "score/kernel": WEIGHT.T})


@pytest.mark.parametrize(("keys", "tensors", "message"), [
    ({"task_type": "SEQ_CLS"}, {}, "lacks the score, though adapter_config.json has task_type SEQ_CLS"),
    ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, {}, "lacks 'score.weight', which .* modules_to_save"),
    ({"task_type": "SEQ_CLS"}, {"score.weight": np.ones((2, 32), np.float32)}, r"\(2, 32\); \(1, 32\) was expected"),
    ({"task_type": "SEQ_CLS"}, {"score.lora_A.weight": np.ones((3, 32), np.float32)}, "'.*score.lora_A.weight', which"),
    ({"task_type": "TOKEN_CLS"}, {"score.weight": WEIGHT}, "'.*score.weight', which fits no kernel of the base"),
    ({"task_type": None}, {"score.weight": WEIGHT}, "'.*score.weight', which fits no kernel of the base"),
])  # fmt: skip
def test_an_adapter_whose_score_is_wrong_or_nobodys_is_refused(folder, params, config, keys, tensors, message):
    save(folder, keys, **tensors)
    with pytest.raises(CheckpointError, match=message):
        load(folder, params, config)


@pytest.mark.parametrize(
    ("family", "message"), [("granite", "transformers has no"), ("bert", "an encoder has no score")]
)
def test_a_reward_models_adapter_over_what_cannot_be_one_is_refused(tiny, folder, family, message):
    save(folder, {"task_type": "SEQ_CLS"})
    known, config = hub.read_config(tiny(family, num_hidden_layers=1))
    with pytest.raises(CheckpointError, match=f"task_type SEQ_CLS, a reward model: {message}"):
        hub.load_adapter(str(folder), hub.shapes(config), family=known, config=config)


def test_a_saved_kernel_is_turned_and_one_that_is_missing_is_refused(folder, weights, config):
    kernel = np.arange(4 * 16 * 32, dtype=np.float32).reshape(4, 16, 32)
    names = {f"model.layers.{i}.self_attn.k_proj.weight": kernel[i] for i in range(4)}
    save(folder, {"modules_to_save": ["k_proj"]}, **names)
    with pytest.raises(
        CheckpointError, match=r"lacks 'model.layers.0.self_attn.k_proj.bias', which .* modules_to_save"
    ):
        load(folder, weights, config)
    biases = {f"model.layers.{i}.self_attn.k_proj.bias": np.ones(16, np.float32) for i in range(4)}
    save(folder, {}, **biases)
    found = load(folder, weights, config).params["blocks"]["0-3"]["attn"]["k"]
    np.testing.assert_array_equal(found["kernel"], np.swapaxes(kernel, 1, 2))
    np.testing.assert_array_equal(found["bias"], np.ones((4, 16)))


def test_tables_that_peft_parted_tied_or_wrote_along(tied, adapter, tmp_path):
    config, weights = hub.read_config(tied)[1], hub.on_disk(str(tied))
    table = np.asarray(weights["embed"]["table"])
    embed, head = "model.embed_tokens", "lm_head"

    def read(name, keys, **tensors):
        hub.export_adapter(str(tmp_path / name), adapter, SPEC, family=FAMILY, base="x")
        save(tmp_path / name, keys, **tensors)
        return load(tmp_path / name, weights, config).params

    new = {f"{embed}.weight": 2 * table}
    parted = read("parted", {"modules_to_save": ["embed_tokens"]}, **new)
    same(parted, {"embed": {"table": 2 * table}, "head": {"table": table}})
    both = read("both", {"modules_to_save": ["embed_tokens", "lm_head"]}, **new, **{f"{head}.weight": 3 * table})
    same(both, {"embed": {"table": 2 * table}, "head": {"table": 3 * table}})
    one = read("head", {"modules_to_save": ["lm_head"]}, **{f"{head}.weight": 3 * table})
    same(one, {"head": {"table": 3 * table}})
    keys = {"modules_to_save": ["model.embed_tokens"], "ensure_weight_tying": True}
    same(read("tied", keys, **new, **{f"{head}.weight": 2 * table}), {"embed": {"table": 2 * table}})
    with pytest.raises(CheckpointError, match="has two tables, though adapter_config.json sets ensure_weight_tying"):
        read("twice", keys, **new, **{f"{head}.weight": 3 * table})
    # A table that was adapted is written along; it says something only where it is not the base's.
    assert read("along", {}, **{f"{embed}.base_layer.weight": table}) == {}
    same(read("other", {}, **{f"{head}.base_layer.weight": 2 * table}), {"embed": {"table": 2 * table}})


def test_pissa_over_a_tied_output_layer_is_refused_with_the_remedy(tied, tmp_path):
    """PEFT subtracts what it starts at from the table that the lookup reads as well."""
    config, weights = hub.read_config(tied)[1], hub.on_disk(str(tied))
    hub.export_adapter(str(tmp_path), random(weights, LoRA(2, targets="head")), LoRA(2), family=FAMILY, base="x")
    assert load(tmp_path, weights, config).lora["head"]
    change(tmp_path, init_lora_weights="pissa")
    with pytest.raises(
        CheckpointError, match=r"output layer that is the embedding.*path_initial_model_for_weight_conv"
    ):
        load(tmp_path, weights, config)


# ---- rows of new tokens ------------------------------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens", "lm_head"
NEW = Vocabulary(99, np.arange(96), np.arange(96, 99))


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_tables_with_rows_of_new_tokens_come_back_over_the_base_without_them(base, tied, tmp_path, is_tied):
    folder = tied if is_tied else base
    (_, config), weights = hub.read_config(folder), hub.on_disk(str(folder))
    trained = tree.partition(hub.load(str(folder), vocabulary=NEW)[1], models.TABLES)[0]
    trained = jax.tree.map(lambda x: np.asarray(x) + np.arange(99, dtype=np.float32)[:, None], trained)
    spec = LoRA(2, targets=".*/(q|v)")
    low = random(weights, spec)
    hub.export_adapter(str(tmp_path), low, spec, family=FAMILY, base=str(folder), trained=trained)
    for params in (weights, hub.shapes(config)):
        back = load(tmp_path, params, config)
        same(back.params, trained)
        same(back.lora, low)
    merged = tmp_path / "merged"
    hub.merge(str(folder), str(merged), adapter=back.lora, trained=back.params)
    assert hub.read_config(merged)[1] == dataclasses.replace(config, vocab_size=99)
    expected = lora.merge(lora.attach(hub.load(str(folder))[1], back))
    for path, x in tree.flat(hub.load(str(merged))[1]).items():
        np.testing.assert_allclose(x, tree.flat(expected)[path], atol=1e-6, err_msg=path)


def test_tables_that_peft_writes_along_after_a_resize(base, tied, adapter, tmp_path):
    """PEFT's names for each way to train a resized model, see get_peft_model_state_dict."""
    table, wrapped = np.arange(99 * 32, dtype=np.float32).reshape(99, 32), "modules_to_save"

    def read(name, folder, keys, **tensors):
        (_, config), weights = hub.read_config(folder), hub.on_disk(str(folder))
        low = random(weights, SPEC)
        hub.export_adapter(str(tmp_path / name), low, SPEC, family=FAMILY, base="x")
        save(tmp_path / name, keys, **tensors)
        return load(tmp_path / name, weights, config)

    both = {f"{EMBED}.weight": table, f"{HEAD}.weight": 2 * table}
    expected = {"embed": {"table": table}, "head": {"table": 2 * table}}
    same(read("plain", base, {}, **both).params, expected)
    within = {f"{EMBED}.{wrapped}.weight": table, f"{HEAD}.{wrapped}.weight": 2 * table}
    within |= {f"{module}.original_module.weight": 3 * table for module in (EMBED, HEAD)}
    saved = {"modules_to_save": ["embed_tokens", "lm_head"]}
    same(read("wrapped", base, saved, **both, **within).params, expected)
    same(read("parted", tied, saved, **both, **within).params, expected)
    once = {f"{EMBED}.weight": table, f"{HEAD}.weight": table}
    same(read("tied", tied, {}, **once).params, {"embed": {"table": table}})
    for name, folder, tensors in (
        ("no head", base, {f"{EMBED}.weight": table}),
        ("no embedding", base, {f"{HEAD}.weight": table}),
        ("tied without head", tied, {f"{EMBED}.weight": table}),
    ):
        with pytest.raises(
            CheckpointError, match="has 99 rows for tokens in one table, and no (embed|head)/table, which"
        ):
            read(name, folder, {}, **tensors)
    with pytest.raises(
        CheckpointError, match=r"'base_model.model.lm_head.weight' in .* has shape \(98, 32\); \(99, 32\)"
    ):
        read("unequal", base, {}, **{f"{EMBED}.weight": table, f"{HEAD}.weight": table[:98]})
    with pytest.raises(CheckpointError, match=r"has shape \(95, 32\); \(96, 32\) was expected"):
        read("shorter", tied, {}, **{f"{EMBED}.weight": table[:95], f"{HEAD}.weight": table[:95]})

    # A table that has grown and is adapted: A has its rows, and the table is written along.
    low = {
        f"{EMBED}.lora_embedding_A": np.ones((3, 99), np.float32),
        f"{EMBED}.lora_embedding_B": np.ones((32, 3), "f"),
    }
    found = read("adapted", tied, {}, **low, **{f"{EMBED}.base_layer.weight": table})
    same(found.params, {"embed": {"table": table}})
    assert found.lora["embed"]["a"].shape == (99, 3)
    head = {f"{HEAD}.lora_A.weight": np.ones((3, 32), "f"), f"{HEAD}.lora_B.weight": np.ones((99, 3), "f")}
    copies = {f"{EMBED}.weight": table, f"{HEAD}.base_layer.weight": 2 * table}
    same(read("adapted head", base, {}, **head, **copies).params, expected)
    with pytest.raises(CheckpointError, match=r"starts at olora of an output layer that has grown.*path_initial_model"):
        read("started", base, {"init_lora_weights": "olora"}, **head, **copies)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_rows_of_some_tokens_that_trained_alone_are_put_into_the_bases_table(base, tied, tmp_path, is_tied):
    folder = tied if is_tied else base
    (_, config), weights = hub.read_config(folder), hub.on_disk(str(folder))
    rows = np.arange(64, dtype=np.float32).reshape(2, 32)
    delta = "token_adapter.trainable_tokens_delta"

    def read(name, keys, **tensors):
        hub.export_adapter(str(tmp_path / name), random(weights, SPEC), SPEC, family=FAMILY, base="x")
        save(tmp_path / name, keys, **tensors)
        return load(tmp_path / name, weights, config).params

    old = np.asarray(weights["embed"]["table"])
    expected = old.copy()
    expected[[90, 7]] = rows
    same(
        read("list", {"trainable_token_indices": [90, 7]}, **{f"{EMBED}.{delta}": rows}), {"embed": {"table": expected}}
    )
    both = {"trainable_token_indices": {"embed_tokens": [90, 7], "lm_head": [7, 90]}}
    found = read("both", both, **{f"{EMBED}.{delta}": rows} | ({} if is_tied else {f"{HEAD}.{delta}": rows}))
    same({"embed": found.pop("embed")}, {"embed": {"table": expected}})
    if not is_tied:
        np.testing.assert_array_equal(found["head"]["table"][[7, 90]], rows)
    # After a resize the tables are written along, and a tied output layer's rows once more.
    table = np.arange(99 * 32, dtype=np.float32).reshape(99, 32)
    along = {f"{module}.token_adapter.base_layer.weight": table for module in (EMBED, HEAD)}
    more = {f"{HEAD}.{delta}": rows} if is_tied else {}
    found = read(
        "grown", {"trainable_token_indices": {"embed_tokens": [98, 97]}}, **along, **more, **{f"{EMBED}.{delta}": rows}
    )
    np.testing.assert_array_equal(found["embed"]["table"], np.concatenate([table[:97], rows[::-1]]))
    assert ("head" in found) == (not is_tied)
    with pytest.raises(CheckpointError, match="lacks trainable_tokens_delta, though"):
        read("none", {"trainable_token_indices": [1]})
    with pytest.raises(CheckpointError, match=r"has shape \(2, 32\); \(1, 32\) was expected"):
        read("fewer", {"trainable_token_indices": [1]}, **{f"{EMBED}.{delta}": rows})


def test_an_encoders_embedding_is_its_output_layer_and_peft_cannot_hold_it(tiny, tmp_path):
    folder, family = tiny("bert"), models.FAMILIES["bert"]
    (_, config), weights = hub.read_config(folder), hub.on_disk(str(folder))
    low, spec = random(weights, LoRA(2, targets=".*/q")), LoRA(2, targets=".*/q")
    how = {"family": family, "base": str(folder), "config": config}
    with pytest.raises(CheckpointError, match="the embedding trained, which is the output layer of an encoder as well"):
        hub.export_adapter(str(tmp_path), low, spec, trained={"embed": {"table": weights["embed"]["table"]}}, **how)
    # PEFT writes the tables of a resized one under both names; where the two parted, there is no such model here.
    table, bias = np.ones((99, 32), np.float32), np.ones(99, np.float32)
    hub.export_adapter(str(tmp_path), low, spec, **how)
    save(tmp_path, {}, **{
        "bert.embeddings.word_embeddings.weight": table,
        "cls.predictions.decoder.weight": table,
        "cls.predictions.decoder.bias": bias,
    })  # fmt: skip
    read = lambda: hub.load_adapter(str(tmp_path), weights, family=family, config=config)
    same(read().params, {"embed": {"table": table}, "mlm": {"bias": bias}})
    rewrite(tmp_path, lambda t: t.update({f"{PREFIX}cls.predictions.decoder.weight": 2 * table}))
    with pytest.raises(CheckpointError, match="other values of the same weight, which this model has once"):
        read()
