"""LLaMA-Factory's dataset_info.json, as its parser reads it."""

import json
from pathlib import Path

import pytest

from jaxsft.data import Conversation, DataError, Preference, Source, Text, Unpaired, parse, resolve, scan
from jaxsft.data.info import adapt

OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def look(tmp_path):
    """look(entry) -> the source of the entry x, whose file data.json is there."""
    (tmp_path / "data.json").write_text("[]")

    def look(entry, **options):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"x": entry, "other": {}}), encoding="utf-8")
        return resolve(Source("x", **options), str(tmp_path))

    return look


def here(**entry):
    return {"file_name": "data.json"} | entry


def record(source, row):
    return parse(adapt(row, source), source.format)[1]


def said(messages):
    return [(message.role, message.content) for message in messages]


# ---- where rows are -------------------------------------------------------------------------------------------------


def test_a_file_name_is_relative_to_the_json(look, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert look(here()).path == str(tmp_path / "data.json")
    assert resolve(Source("x"), str(tmp_path / "dataset_info.json")).path == str(tmp_path / "data.json")
    with pytest.raises(DataError, match=r"entry 'x' names .*/gone.json, which is not there"):
        look({"file_name": "gone.json"})


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"hf_hub_url": "org/name"}, "org/name:train"),
        ({"hf_hub_url": "org/name", "split": "train_sft"}, "org/name:train_sft"),
        ({"hf_hub_url": "org/name", "subset": "zh"}, "org/name@zh:train"),
        ({"hf_hub_url": "org/name", "ms_hub_url": "no/name", "subset": "en", "split": "test"}, "org/name@en:test"),
        ({"hf_hub_url": "wiki_qa", "file_name": "gone.json"}, "wiki_qa:train"),
    ],
)
def test_a_hub_url_takes_subset_and_split(look, entry, path):
    assert look(entry).path == path


@pytest.mark.parametrize("entry", [{"ms_hub_url": "a/b"}, {"om_hub_url": "a/b"}, {"script_url": "a"}, {}])
def test_what_llama_factory_alone_can_download_is_refused(look, entry):
    with pytest.raises(DataError, match=f"has {next(iter(entry), 'no source')}; download its files and give file_name"):
        look(entry)


def test_num_samples_is_a_limit_unless_the_run_has_its_own(look):
    found = look(here()), look(here(num_samples=5)), look(here(num_samples=5), max_rows=2)
    assert [source.max_rows for source in found] == [None, 5, 2]


def test_weight_epochs_and_format_of_the_run_stay(look):
    found = look(here(), weight=2.0, epochs=3.0, format="text")
    assert (found.weight, found.epochs, found.format) == (2.0, 3.0, "text")


# ---- columns --------------------------------------------------------------------------------------------------------

WIDE = {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["a", "b"]], "kto_tag": True}


def test_without_columns_the_usual_ones_alone_are_read(look):
    found = record(look(here()), WIDE)
    assert isinstance(found, Conversation)
    assert said(found.messages) == [("user", "i\nn"), ("assistant", "o")]
    talk = {"conversations": TALK, "system": "s", "tools": '[{"name": "f"}]'}
    assert record(look(here(formatting="sharegpt")), talk) == parse({"conversations": TALK})[1]


def test_where_columns_are_given_one_they_do_not_mention_is_not_read(look):
    found = record(look(here(columns={"prompt": "instruction", "response": "output"})), WIDE)
    assert said(found.messages) == [("user", "i"), ("assistant", "o")]
    with pytest.raises(DataError, match="alpaca rows need .*output or chosen is not among instruction, system"):
        record(look(here(columns={"prompt": "instruction", "system": "system"})), WIDE)
    with pytest.raises(DataError, match=r"is not among \(none\)"):
        record(look(here(columns={})), WIDE)


def test_columns_have_the_names_of_the_entry(look):
    names = {"prompt": "q", "query": "more", "response": "answer", "system": "who", "history": "before"}
    row = {"q": "i", "more": "n", "answer": "o", "who": "s", "before": [["a", "b"]], "output": "no"}
    found = said(record(look(here(columns=names)), row).messages)
    assert found == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i\nn"), ("assistant", "o")]


def test_a_prompt_column_alone_is_plain_text(look):
    source = look(here(columns={"prompt": "content"}))
    assert (source.format, record(source, {"content": "once", "instruction": "no"})) == ("text", Text("once"))


@pytest.mark.parametrize("ranking", [True, False])
def test_ranking_decides_whether_pairs_are_read(look, ranking):
    names = {"prompt": "q", "response": "a", "chosen": "good", "rejected": "bad"}
    found = record(look(here(ranking=ranking, columns=names)), {"q": "i", "a": "o", "good": "+", "bad": "-"})
    assert isinstance(found, Preference if ranking else Conversation)
    answers = [found.chosen[0], found.rejected[0]] if ranking else found.messages[1:]
    assert [answer.content for answer in answers] == (["+", "-"] if ranking else ["o"])


@pytest.mark.parametrize("columns", [None, {"prompt": "q", "response": "a"}, {"prompt": "q", "chosen": "a"}])
def test_ranking_without_its_columns_is_refused(look, columns):
    with pytest.raises(DataError, match="is ranking, and its columns name no chosen and rejected; add them"):
        look(here(ranking=True, **{"columns": columns} if columns else {}))


@pytest.mark.parametrize("label", [True, False])
def test_a_kto_tag_names_the_column_of_labels(look, label):
    alpaca = look(here(columns={"prompt": "p", "response": "r", "kto_tag": "ok"}))
    talk = look(here(formatting="sharegpt", columns={"messages": "c", "kto_tag": "ok"}))
    for found in (record(alpaca, {"p": "q", "r": "a", "ok": label}), record(talk, {"c": TALK, "ok": label})):
        assert (said(found.prompt), said(found.completion)) == ([("user", "q")], [("assistant", "a")])
        assert found.label is label


# ---- tags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_tags_name_roles_and_keys(look, formatting):
    source = look(here(formatting=formatting, columns={"messages": "chat"}, tags=OPENAI))
    row = {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert said(record(source, row).messages) == [("user", "q"), ("assistant", "a")]
    odd = {"role_tag": "who", "content_tag": "what", "user_tag": "you", "assistant_tag": "user", "system_tag": "gpt"}
    source = look(here(formatting=formatting, columns={"messages": "chat"}, tags=odd))
    row = {"chat": [{"who": who, "what": who} for who in ("gpt", "you", "user")]}
    assert said(record(source, row).messages) == [("system", "gpt"), ("user", "you"), ("assistant", "user")]


def test_without_tags_the_usual_ones_are_known(look):
    calls = [{"from": "function_call", "value": '{"name": "f"}'}, {"from": "observation", "value": "3"}]
    talk = [{"from": "system", "value": "s"}, TALK[0], *calls, TALK[1]]
    found = record(look(here(formatting="sharegpt")), {"conversations": talk})
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    with pytest.raises(DataError, match="message 1 of conversations has from 'user'; the entry's tags name human, gpt"):
        record(look(here(formatting="sharegpt")), {"conversations": [{"from": "user", "value": "q"}]})


@pytest.mark.parametrize("role", ["system", "observation", "function_call", "human", "gpt"])
def test_where_tags_are_given_a_role_they_do_not_mention_is_refused_by_name(look, role):
    source = look(here(formatting="sharegpt", columns={"messages": "messages"}, tags=OPENAI))
    with pytest.raises(DataError, match=f"message 1 of .* has role '{role}'; the entry's tags name user, assistant"):
        record(source, {"messages": [{"role": role, "content": "x"}, *TALK]})


@pytest.mark.parametrize(("tag", "message"), [("role_tag", "message 1 of"), ("content_tag", "has no content")])
def test_keys_that_tags_do_not_mention_are_not_guessed(look, tag, message):
    tags = {key: name for key, name in OPENAI.items() if key != tag}
    source = look(here(formatting="sharegpt", columns={"messages": "messages"}, tags=tags))
    with pytest.raises(DataError, match=message):
        record(source, {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})


def test_keys_beside_those_of_the_tags_do_not_stand_in_for_them(look):
    source = look(here(formatting="sharegpt"))
    talk = [turn | {"role": "critic", "content": "no"} for turn in TALK]
    assert said(record(source, {"conversations": talk}).messages) == [("user", "q"), ("assistant", "a")]


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (here(columns={"promt": "q"}), "entry 'x' has columns promt; known are prompt, query, response"),
        (here(formatting="sharegpt", tags={"human_tag": "q"}), "has tags human_tag; known are role_tag, content_tag"),
        (here(formatting="chatml"), "has formatting 'chatml'; expected alpaca, sharegpt or openai"),
        (here(columns={"prompt": "q", "response": "a", "videos": "v"}), "has videos, which no model here takes"),
        (["data.json"], r"entry 'x' is \['data.json'\]; expected an object"),
    ],
)
def test_a_wrong_entry_is_named(look, entry, message):
    with pytest.raises(DataError, match=message):
        look(entry)


def test_an_unknown_entry_is_told_the_nearest(look, tmp_path):
    look(here())
    with pytest.raises(DataError, match=r"dataset_info.json has no entry 'othr'; did you mean other\?"):
        resolve(Source("othr"), str(tmp_path))
    with pytest.raises(DataError, match="has no entry 'qqq'; it has x, other"):
        resolve(Source("qqq"), str(tmp_path))


@pytest.mark.parametrize("path", ["train.jsonl", "org/name", "./folder", "a/*.txt"])
def test_what_is_no_name_stays_as_it_is(look, tmp_path, path):
    look(here())
    assert resolve(Source(path), str(tmp_path)) == resolve(Source(path), "") == Source(path)


@pytest.mark.parametrize("text", [None, "{", "\xff"])
def test_an_info_that_cannot_be_read_is_refused(tmp_path, text):
    if text:
        (tmp_path / "dataset_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"data.info .*dataset_info.json cannot be read .*; give a dataset_info.json"):
        resolve(Source("x"), str(tmp_path))


# ---- LLaMA-Factory's own demo data ----------------------------------------------------------------------------------

SPOKEN = "identity alpaca_en_demo alpaca_zh_demo mllm_demo glaive_toolcall_en_demo glaive_toolcall_zh_demo"
KINDS = dict.fromkeys(SPOKEN.split(), Conversation)
KINDS |= {"dpo_en_demo": Preference, "dpo_zh_demo": Preference, "kto_en_demo": Unpaired}
KINDS |= {"wiki_demo": Text, "c4_demo": Text}
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def raw(file):
    text = file.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    return (
        json.loads(text) if file.suffix == ".json" else [json.loads(line) if line[0] == "{" else line for line in lines]
    )


def turns_of(row):
    """(role, words) of a raw row, calls as their JSON."""
    if "instruction" in row:
        return [("user", "\n".join(filter(None, (row["instruction"], row["input"])))), ("assistant", row["output"])]
    turns = row.get("conversations") or row["messages"]
    turns = turns + [row[side] for side in ("chosen", "rejected") if side in row]
    pairs = [(turn.get("from") or turn["role"], turn.get("value") or turn["content"]) for turn in turns]
    return [(ROLES.get(role, role), json.loads(words) if role == "function_call" else words) for role, words in pairs]


def turns_in(found):
    messages = found.messages if isinstance(found, Conversation) else found.prompt
    messages += found.chosen + found.rejected if isinstance(found, Preference) else ()
    messages += found.completion if isinstance(found, Unpaired) else ()
    calls = lambda message: [{"name": call.name, "arguments": call.arguments} for call in message.calls]
    plain = lambda message: calls(message)[0] if len(message.calls) == 1 else calls(message)
    return [(message.role, plain(message) if message.calls else message.content) for message in messages]


def test_every_entry_whose_file_is_there_is_tried(shared):
    folder = shared / "sft_llamafactory"
    entries = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    assert {name for name, one in entries.items() if (folder / one.get("file_name", "-")).is_file()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_an_entry_gives_every_row_as_it_stands_in_its_file(name, shared):
    source = resolve(Source(name), str(shared / "sft_llamafactory"))
    rows = raw(Path(source.path))
    found = [parse(adapt(row.fields, source), source.format, row.folder)[1] for row in scan(source.path)]
    assert {type(one) for one in found} == {KINDS[name]}
    if KINDS[name] is Text:
        assert [one.text for one in found] == [row if isinstance(row, str) else row["text"] for row in rows]
        return
    assert [turns_in(one) for one in found] == [turns_of(row) for row in rows]
    assert [len(one.tools) for one in found] == [len(json.loads(row.get("tools") or "[]")) for row in rows]
    if name == "kto_en_demo":
        assert [one.label for one in found] == [row["label"] for row in rows]
    if name == "mllm_demo":
        assert all(Path(path).is_file() for one in found for path in one.images)
        assert [len(one.images) for one in found] == [len(row["images"]) for row in rows]
