import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import jaxsft
from jaxsft import data, hub
from jaxsft.data import templates
from jaxsft.hub.tokenizer import pad_apart

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


def judge(folder, *, tokenizer=True, pad_token=None, eos_token="<|im_end|>", generation=(2,), **keys):
    """Makes a folder a reward model's with the shipped tokenizer, whose tokens and config say what is given."""
    folder.mkdir()
    raw = json.loads((Path(jaxsft.BASE) / "config.json").read_text())
    raw |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(raw | keys))
    if tokenizer:
        shutil.copyfile(Path(jaxsft.BASE) / "tokenizer.json", folder / "tokenizer.json")
        settings = json.loads((Path(jaxsft.BASE) / "tokenizer_config.json").read_text())
        settings |= {"pad_token": pad_token, "eos_token": eos_token}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(generation)}))
    return folder


def read(folder):
    """(config.json's padding token, the tokenizer's, its name)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return json.loads((folder / "config.json").read_text())["pad_token_id"], tokenizer.pad_token_id, tokenizer.pad_token


TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # the shipped vocabulary's first: 0, 1, 2
BYTE = "\u00ff"  # byte 0xFF


@pytest.mark.parametrize(("keys", "expected"), [
    ({"pad_token": START, "pad_token_id": 1}, START),  # it ends no text, so it stays
    ({"pad_token": START, "pad_token_id": 0}, START),  # the tokenizer makes the rows, so the config follows
    ({"pad_token": None, "pad_token_id": 1}, START),  # or the tokenizer, where it has none
    ({"pad_token": END, "pad_token_id": 1}, START),
    ({"pad_token": TEXT, "pad_token_id": 0, "generation": (0, 2)}, TEXT),  # as Qwen's: it could end one, and does not
    ({"pad_token": END, "pad_token_id": 2}, TEXT),  # what ends texts does not pad them
    ({"pad_token": None, "pad_token_id": None}, TEXT),
    ({"pad_token": "[PAD]", "pad_token_id": None}, TEXT),  # the tokenizer's 2560, and the model has 2560 rows
    ({"pad_token": END, "pad_token_id": 2, "generation": (0, 2)}, BYTE),
    ({"pad_token": TEXT, "pad_token_id": 0, "eos_token": TEXT}, BYTE),  # as GPT 2's
])  # fmt: skip
def test_a_reward_model_pads_with_a_token_that_ends_no_text(keys, expected, tmp_path):
    folder = judge(tmp_path / "judge", **keys)
    pad_apart(folder)
    number = hub.load_tokenizer(jaxsft.BASE).get_vocab()[expected]
    assert read(folder) == (number, number, expected)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    pad_apart(folder)  # and once is enough
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_no_text_holds_the_byte_that_pads_where_nothing_else_does():
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), 0x1F408]))
    assert tokenizer.get_vocab()[BYTE] not in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_a_token_to_choose_there_is_none_and_a_language_model_is_left_alone(tmp_path):
    for own, expected in ((2, None), (5, 5), (2560, None), (None, None)):  # 2 is eos, and there are 2560 rows
        folder = judge(tmp_path / str(own), tokenizer=False, pad_token_id=own)
        pad_apart(folder)
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == expected
    folder = judge(tmp_path / "language", pad_token=END, architectures=["LlamaForCausalLM"], pad_token_id=2)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    pad_apart(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_an_old_map_of_special_tokens_agrees(tmp_path):
    folder = judge(tmp_path / "judge", pad_token=END)
    old = folder / "special_tokens_map.json"
    old.write_text(json.dumps({"eos_token": END, "pad_token": END}))
    pad_apart(folder)
    assert json.loads(old.read_text()) == {"eos_token": END, "pad_token": TEXT}


def test_a_template_that_ends_answers_with_the_padding_token_parts_the_two(tmp_path):
    """What merging found was fit to pad, until the run's tokenizer said what ends an answer."""
    folder = judge(tmp_path / "judge", pad_token=END, eos_token=TEXT, generation=(0,), eos_token_id=0)
    pad_apart(folder)
    assert read(folder) == (2, 2, END)
    hub.save_template(folder, data.with_template(hub.load_tokenizer(str(folder)), "chatml"))
    chosen, own, name = read(folder)
    assert (chosen == own, name) == (True, BYTE)


def test_a_folder_with_no_tokenizer_is_refused_and_not_given_an_empty_one(tiny):
    for family in ("bert", "llama"):
        with pytest.raises(hub.CheckpointError, match="has no tokenizer"):
            hub.load_tokenizer(str(tiny(family)))
