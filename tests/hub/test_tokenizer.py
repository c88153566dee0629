import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import jaxsft
from jaxsft import data, hub
from jaxsft.data import templates

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@pytest.fixture
def base(tmp_path):
    """The shipped tokenizer as a base model has it: texts end with <|endoftext|>, and there is no chat template."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in FILES[:3]:
        shutil.copyfile(Path(jaxsft.BASE) / name, folder / name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = "<|endoftext|>"
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    return folder


def test_an_export_asks_and_stops_as_it_was_taught(base, tmp_path):
    tokenizer = data.with_template(hub.load_tokenizer(str(base)), "chatml")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == stop
    assert stop in hub.stop_tokens(str(base), tokenizer)
    merged = shutil.copytree(base, tmp_path / "merged")
    hub.save_template(merged, tokenizer)
    theirs = AutoTokenizer.from_pretrained(merged)
    assert theirs.eos_token == "<|im_end|>"
    turns = [{"role": "user", "content": "hi"}]
    asked = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((merged / "generation_config.json").read_text()) == {"eos_token_id": stop, "pad_token_id": 0}
    again = hub.load_tokenizer(str(merged))
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)


def test_what_the_base_says_already_is_not_touched(tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in FILES:
        shutil.copyfile(Path(jaxsft.BASE) / name, merged / name)
    before = {name: (merged / name).read_bytes() for name in FILES}
    hub.save_template(merged, hub.load_tokenizer(jaxsft.BASE))
    assert {name: (merged / name).read_bytes() for name in FILES} == before


def test_an_adapter_folder_takes_the_template_alone(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert hub.adapter_template(str(adapter)) == ""
    hub.save_template(adapter, data.with_template(hub.load_tokenizer(str(base)), "chatml"))
    assert [file.name for file in adapter.iterdir()] == ["chat_template.jinja"]
    tokenizer = data.with_template(hub.load_tokenizer(str(base)), hub.adapter_template(str(adapter)))
    assert (tokenizer.chat_template, tokenizer.eos_token) == (templates.source("chatml"), "<|im_end|>")


def test_a_folder_with_no_tokenizer_is_refused_and_not_given_an_empty_one(tiny):
    for family in ("bert", "llama"):
        with pytest.raises(hub.CheckpointError, match="has no tokenizer"):
            hub.load_tokenizer(str(tiny(family)))
