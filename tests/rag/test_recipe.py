import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsft.hub import CheckpointError
from jaxsft.rag import recipe
from jaxsft.rag.recipe import Recipe

KIND = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules.pooling."


def modules(*kinds: str) -> list[dict]:
    kinds = [kind if "." in kind else KIND + kind for kind in kinds]
    paths = ["", *(f"{i}_{kind.rpartition('.')[2]}" for i, kind in enumerate(kinds) if i)]
    return [{"idx": i, "name": str(i), "path": path, "type": k} for i, (k, path) in enumerate(zip(kinds, paths))]  # noqa: B905


def folder_of(tmp_path: Path, **files) -> Path:
    """name with __ for / and without .json -> its content."""
    for name, value in files.items():
        file = tmp_path / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(value))
    return tmp_path


PLAIN = {
    "modules": modules("Transformer", "Pooling", "Normalize"),
    "1_Pooling__config": {"pooling_mode_cls_token": True},
}


@pytest.mark.parametrize(("config", "expected"), [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, ("mean",)),
    ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}, ("cls", "lasttoken")),
    ({"pooling_mode": "weightedmean", "embedding_dimension": 8}, ("weightedmean",)),
    ({"pooling_mode": ["max", "mean_sqrt_len_tokens"]}, ("max", "mean_sqrt_len_tokens")),
    ({}, ("mean",)),
])  # fmt: skip
def test_a_pooling_is_read_in_its_old_and_new_form(tmp_path, config, expected):
    found = recipe.read(folder_of(tmp_path, **PLAIN | {"1_Pooling__config": config}))
    assert found.pooling == expected
    assert recipe.read(tmp_path, "max").pooling == ("max",)


def test_the_longest_text_prompts_and_lower_case_are_read(tmp_path):
    said = {"prompts": {"query": "q: ", "passage": "p: ", "other": "o: "}, "default_prompt_name": "other"}
    more = {"sentence_bert_config": {"max_seq_length": 12, "do_lower_case": True}, "config_sentence_transformers": said}
    found = recipe.read(folder_of(tmp_path, **PLAIN, **more))
    assert (found.max_tokens, found.lower, found.query, found.document) == (12, True, "q: ", "p: ")
    said["prompts"] = {"document": "", "passage": "p: ", "other": "o: "}
    found = recipe.read(folder_of(tmp_path, config_sentence_transformers=said))
    assert (found.query, found.document) == ("o: ", "p: ")
    said["prompts"] = {"query": "", "document": "", "other": "o: "}
    found = recipe.read(folder_of(tmp_path, config_sentence_transformers=said))
    assert (found.query, found.document) == ("", "")


@pytest.mark.parametrize(("files", "message"), [
    ({"modules": modules("Transformer", "LSTM", "Pooling")}, "a module '.*LSTM' at '1_LSTM' that is not supported"),
    ({"modules": modules("Transformer", "Normalize", "Pooling")}, "'2_Pooling' that is not supported there"),
    ({"modules": modules("Transformer", "Normalize")}, "no Transformer with a Pooling behind it"),
    ({"modules": {}}, "is no list of modules"),
    ({"1_Pooling__config": {"pooling_mode_first": True}}, "'pooling_mode_first' = True, which would change"),
    ({"1_Pooling__config": {"pooling_mode": "median"}}, "pooling 'median' is not known; known are cls"),
    ({"sentence_bert_config": {"query_expansion": {"length": 32}}}, "'query_expansion' = "),
    ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "'transformer_task' = 'fill-mask'"),
    ({"sentence_bert_config": {"max_length": 3}}, "'max_length' = 3"),
    ({"config_sentence_transformers": {"truncate_dim": 64}}, "'truncate_dim' = 64"),
    ({"config_sentence_transformers": {"similarity_fn_name": "manhattan"}}, "'similarity_fn_name' = 'manhattan'"),
])  # fmt: skip
def test_what_would_change_the_vectors_is_refused(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message):
        recipe.read(folder_of(tmp_path, **PLAIN | files))


def test_a_dot_product_is_that_of_unit_vectors_only_where_they_are_normalised(tmp_path):
    folder_of(tmp_path, **PLAIN, config_sentence_transformers={"similarity_fn_name": "dot"})
    assert recipe.read(tmp_path).pooling == ("cls",)
    folder_of(tmp_path, modules=modules("Transformer", "Pooling"))
    with pytest.raises(CheckpointError, match="'similarity_fn_name' = 'dot'"):
        recipe.read(tmp_path)


def test_a_dense_layer_stands_behind_the_pooling(tmp_path):
    draw = np.random.default_rng(0)
    kernel, bias = draw.normal(size=(3, 2)).astype(np.float32), draw.normal(size=3).astype(np.float32)
    config = {
        "in_features": 2,
        "out_features": 3,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    folder_of(
        tmp_path, **PLAIN | {"modules": modules("Transformer", NEW + "Pooling", "Dense")}, **{"2_Dense__config": config}
    )
    save_file({"linear.weight": kernel, "linear.bias": bias}, tmp_path / "2_Dense/model.safetensors")
    x = draw.normal(size=(1, 4, 2)).astype(np.float32)
    found = recipe.vectors(recipe.read(tmp_path), jnp.asarray(x), jnp.ones((1, 4), bool))
    expected = np.tanh(kernel @ x[0, 0] + bias)
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-5)
    for key, value in {
        "activation_function": "torch.nn.modules.activation.GELU",
        "use_residual": True,
        "scale": 2,
    }.items():
        folder_of(tmp_path, **{"2_Dense__config": config | {key: value}})
        with pytest.raises(CheckpointError, match=f"'{key}' = "):
            recipe.read(tmp_path)


def test_what_is_written_is_read_again(tmp_path):
    made = Recipe(tmp_path, ("cls", "max"), (), 99, True, "q: ", "p: ", False)
    recipe.write(tmp_path, made, 8, 99)
    found = recipe.read(tmp_path)
    assert vars(found) == vars(made)
