"""LLaMA-Factory's dataset_info.json, read as it is: a name in it becomes a `Source`.

An entry says where rows are, their formatting, what their columns are called (`columns`) and how turns and roles are
written (`tags`). LLaMA-Factory's rule holds: where an entry has `columns`, a column that it does not mention is not
read, even under its usual name; the same goes for `tags`. An entry without them reads the usual ones alone.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsft.data.formats.turns import show
from jaxsft.data.rows import DataError

# LLaMA-Factory's name of a column -> ours.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
}
MEDIA = ("videos", "audios")  # mentioned in entries; no model here takes them
USUAL = {name: name for name in ("instruction", "input", "output", "conversations")}  # LLaMA-Factory's defaults
TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}


@dataclass(frozen=True)
class Source:
    """Rows from one place, and how much of them a mixture takes."""

    path: str
    """a file, folder or glob (json, jsonl, csv, parquet, arrow, txt, .gz of them), a hub data set
    (org/name@subset:split), or a name in data.info"""
    format: str = "auto"
    """alpaca, sharegpt, messages, prompt_completion, preference, unpaired, prompt, text or image; auto tells each row
    by its columns"""
    weight: float = 1.0
    """the share of rows in the mixture, relative to the others; used where data.mix is interleave_*"""
    epochs: float = 1.0
    """how often a row comes in one epoch of the whole, such as 2, or 0.5 for half of the rows; for data.mix concat"""
    max_rows: int | None = None
    """read only so many rows, the first ones"""
    columns: dict[str, str] | None = None
    """names of columns, ours: theirs, such as {instruction: question, output: answer}; others are then not read"""
    tags: dict[str, str] | None = None
    """how turns are written, in LLaMA-Factory's terms: role_tag, content_tag, user_tag, assistant_tag, ..."""


def resolve(source: Source, info: str) -> Source:
    """Looks up a source's path among the names of a dataset_info.json.

    Args:
      source: its path may be a name; anything else comes back as it is.
      info: the path of a dataset_info.json, or of the folder it is in; "" for none.

    Returns:
      the source that the entry describes, with weight, epochs and, where given, max_rows and format of `source`.

    Raises:
      DataError: the file cannot be read, the entry is wrong, or it needs what only LLaMA-Factory can download.

    Example:
      >>> resolve(Source("train.jsonl"), "").path
      'train.jsonl'
    """
    if not info:
        return source
    file = Path(info).expanduser()
    file = file / "dataset_info.json" if file.is_dir() else file
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.info {file} cannot be read ({error}); give a dataset_info.json") from error
    if not isinstance(entries, dict) or source.path not in entries:
        if "." in source.path or "/" in source.path or not isinstance(entries, dict) or Path(source.path).exists():
            return source
        near = difflib.get_close_matches(source.path, entries, 1)
        listed = ", ".join([*list(entries)[:12], *["..."] * (len(entries) > 12)])
        hint = f"; did you mean {near[0]}?" if near else f"; it has {listed}"
        raise DataError(f"{file} has no entry {source.path!r}{hint}")
    return _entry(source, entries[source.path], file)


def _entry(source: Source, entry: Any, file: Path) -> Source:
    where = f"{file} entry {source.path!r}"
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {show(entry)}; expected an object")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where} has formatting {formatting!r}; expected alpaca, sharegpt or openai")
    named = entry.get("columns")
    if named is not None and (unknown := [key for key in named if key not in COLUMNS and key not in MEDIA]):
        raise DataError(f"{where} has columns {', '.join(unknown)}; known are {', '.join(COLUMNS)}")
    if unknown := [
        key for key in entry.get("tags") or {} if key not in TAGS and key not in ("role_tag", "content_tag")
    ]:
        raise DataError(f"{where} has tags {', '.join(unknown)}; known are role_tag, content_tag, {', '.join(TAGS)}")
    columns = USUAL if named is None else {COLUMNS[key]: name for key, name in named.items() if key in COLUMNS and name}
    if media := [key for key in MEDIA if (named or {}).get(key)]:
        raise DataError(f"{where} has {' and '.join(media)}, which no model here takes")
    if columns.keys() == {"instruction"}:  # LLaMA-Factory's form of plain text
        return _place(source, entry, file, "text", {"text": columns["instruction"]}, None)
    if entry.get("ranking") and not {"chosen", "rejected"} <= columns.keys():
        raise DataError(f"{where} is ranking, and its columns name no chosen and rejected; add them")
    if not entry.get("ranking"):
        columns = {ours: theirs for ours, theirs in columns.items() if ours not in ("chosen", "rejected")}
    format = "alpaca" if formatting == "alpaca" else "messages" if formatting == "openai" else "sharegpt"
    if format == "messages":
        columns = {("messages" if ours == "conversations" else ours): theirs for ours, theirs in columns.items()}
    default = {"role_tag": "from", "content_tag": "value"} | {key: theirs for key, (theirs, _) in TAGS.items()}
    tags = default if entry.get("tags") is None else entry["tags"]
    return _place(source, entry, file, format, columns, None if format == "alpaca" else tags)


def _place(source: Source, entry: Mapping, file: Path, format: str, columns: dict, tags: dict | None) -> Source:
    if "hf_hub_url" in entry:
        path = entry["hf_hub_url"] + (f"@{entry['subset']}" if entry.get("subset") else "")
        path += f":{entry.get('split') or 'train'}"
    elif "file_name" in entry:
        path = str(file.parent / entry["file_name"])
        if not Path(path).exists():
            raise DataError(f"{file} entry {source.path!r} names {path}, which is not there")
    else:
        kind = next((key for key in entry if key.endswith(("_url", "_name"))), "no source")
        raise DataError(
            f"{file} entry {source.path!r} has {kind}; download its files and give file_name, or hf_hub_url"
        )
    return Source(
        path=path,
        format=format if source.format == "auto" else source.format,
        weight=source.weight,
        epochs=source.epochs,
        max_rows=entry.get("num_samples") if source.max_rows is None else source.max_rows,
        columns=columns,
        tags=tags,
    )


def adapt(fields: dict[str, Any], source: Source) -> dict[str, Any]:
    """Gives a row our names of columns and roles, as its source describes them.

    Raises:
      DataError: a turn has a role that the tags do not name.

    Example:
      >>> adapt({"q": "hi", "a": "hello", "output": "no"}, Source("x", columns={"instruction": "q", "output": "a"}))
      {'instruction': 'hi', 'output': 'hello'}
    """
    if source.columns is not None:
        fields = {ours: fields[theirs] for ours, theirs in source.columns.items() if theirs in fields}
    if source.tags is not None:
        for name in ("conversations", "messages", "chosen", "rejected"):
            if name in fields:
                fields = fields | {name: _retag(fields[name], source.tags, name)}
    return fields


def _retag(found: Any, tags: Mapping[str, str], name: str) -> Any:
    """Turns with our names; what is no list of objects is left for the format to refuse."""
    if isinstance(found, dict):
        return _retag([found], tags, name)[0]
    if not isinstance(found, list):
        return found
    roles = {tags[key]: ours for key, (_, ours) in TAGS.items() if tags.get(key)}
    role, content = tags.get("role_tag") or "", tags.get("content_tag") or ""
    turns = []
    for number, message in enumerate(found, 1):
        if isinstance(message, dict):
            said = message.get(role)
            if not isinstance(said, str) or said not in roles:
                known = ", ".join(roles)
                raise DataError(
                    f"message {number} of {name} has {role} {show(said)}; the entry's tags name {known or 'no roles'}"
                )
            rest = {key: value for key, value in message.items() if key not in (role, content)}
            message = rest | {"role": roles[said], "content": message.get(content)}
        turns.append(message)
    return turns
