"""Look at data before learning from it: the tokens of the first rows with the learned ones coloured, and a report.

    python scripts/inspect_data.py --config configs/inspect_data.yaml
    python scripts/inspect_data.py --config configs/quickstart.yaml --show 5
    python scripts/inspect_data.py --model.path BASE --data.train mine.jsonl

It takes the run file of a training script as it is, and reads its model's tokenizer, its data section and what it
predicts (train.objective): with masked tokens, what may be masked is coloured.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxsft import config, data, hub, models, report, run, sections, session


@dataclass(frozen=True)
class Config:
    """What to look at; the other sections are those of the training scripts, and are not used."""

    model: sections.Model = sections.Model()
    data: sections.Data = sections.Data()
    show: int = 3
    """rows whose tokens are printed"""
    out: str = "runs/inspect"
    """the folder for lengths.png"""
    init: Literal["pretrained", "random"] = "pretrained"
    """of scripts/pretrain.py, not used"""
    tuning: sections.Tuning = sections.Tuning()
    preference: sections.Preference = sections.Preference()
    reward: sections.Reward = sections.Reward()
    optim: sections.Optim = sections.Optim()
    train: sections.Pretraining = sections.Pretraining()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample()
    export: sections.Export = sections.Export()


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; of a character that several tokens spell, at the last of them."""
    found, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd") or len(waiting) == 4
        found.append(text if whole else "")
        waiting = [] if whole else waiting
    return found


def show(title: str, example: data.Example, tokenizer) -> None:
    """The tokens of a document, or of a part of one."""
    ids, mask = example
    sizes = f"{len(ids)} tokens, {int(mask.sum())} learned"
    report.tokens(f"{title}: {sizes}", pieces(tokenizer, ids.tolist()), mask.tolist())


def pair(rows: data.PackedPairs, number: int, tokenizer) -> None:
    """A pair as it is packed: the prompt once, and both answers behind its last token."""
    shared = int(rows.shared[number])
    chosen, rejected = rows.pair(number)
    title = f"pair {number + 1} of {len(rows.documents):,}"
    if shared:
        show(f"{title}, prompt", data.Example(*(array[:shared] for array in chosen)), tokenizer)
    own = f"chosen ({'label' if rows.mismatched else 'margin'} {rows.values[number]:g})"
    other = "another row's answer" if rows.mismatched else "rejected"
    for name, side in ((own, chosen), (other, rejected)):
        show(f"{title}, {name}", data.Example(*(array[shared:] for array in side)), tokenizer)


def packing(rows: data.PackedPairs, most: int) -> None:
    """What lies side by side in the first row."""
    row, cells = rows[0], []
    for segment in np.unique(row.segments[row.segments > 0])[:most].tolist():
        here = row.segments == segment
        part, positions = ("prompt", "chosen", "rejected")[(segment - 1) % 3], row.positions[here]
        counts = (f"{positions.min()} - {positions.max()}", str(here.sum()), str(row.mask[here].sum()))
        cells.append((str(segment), str(row.row[(segment - 1) // 3] + 1), part, *counts))
    title = f"the first of {len(rows):,} rows of {rows.length:,} tokens"
    report.table(title, ("segment", "pair", "", "positions", "tokens", "learned"), cells, lines=False)


def images(cfg: Config) -> None:
    """The classes of image rows, and the files that are not there."""
    counts, missing, first = Counter(), 0, ""
    for row in data.records(cfg.data):
        counts[row.label] += 1
        if not Path(row.path).is_file():
            missing, first = missing + 1, first or row.path
    report.table("classes", ("class", "images"), [(name, f"{n:,}") for name, n in counts.most_common()], lines=False)
    report.summary("data", {"images": f"{counts.total():,}", "missing": f"{missing:,} {first}"})


def main(cfg: Config) -> None:
    kind = data.kind_of(cfg.data)
    if kind == "image":
        images(cfg)
        return
    tokenizer, _ = session.load_tokenizer(cfg.model, cfg.data.template)
    if kind in ("preference", "unpaired"):
        _, shape = hub.read_config(hub.resolve(cfg.model.path))
        rows, _, found = data.load_pairs(cfg.data, tokenizer, kind, share_prompt=models.shares_prompts(shape))
    elif kind == "prompt":
        rows, _, found = data.load_prompts(cfg.data, tokenizer)
    else:
        rows, _, found = data.load(cfg.data, tokenizer, "masked" if cfg.train.objective == "masked" else "learn")

    # ---- the first rows, token by token --------------------------------------------------------------------------
    if isinstance(rows, data.PackedPairs):
        documents = np.unique(rows.documents)
        for number in range(min(cfg.show, len(rows.documents))):
            pair(rows, number, tokenizer)
        packing(rows, 3 * cfg.show)
    else:
        documents = rows.documents
        for number, document in enumerate(np.unique(documents)[: cfg.show], 1):
            show(f"document {number} of {found.documents:,}", rows.document(int(document)), tokenizer)

    # ---- the report ----------------------------------------------------------------------------------------------
    lengths = np.concatenate([source.lengths for source in rows.sources])[documents]
    png = Path(cfg.out) / "lengths.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    report.plot_lengths(lengths, cfg.data.max_length, png)
    report.histogram("tokens of a document", lengths)
    report.summary("data", {**dict(found.lines()), "length histogram": png})


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
