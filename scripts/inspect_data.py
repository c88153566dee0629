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

from jaxsft import config, data, hub, report, run, sections


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
    tokenizer = data.with_template(hub.load_tokenizer(cfg.model.path), cfg.data.template)
    if kind == "learn":
        rows, _, found = data.load(cfg.data, tokenizer, "masked" if cfg.train.objective == "masked" else "learn")
    else:
        rows, _, found = data.load_rows(cfg.data, tokenizer, kind)

    # ---- the first rows, token by token --------------------------------------------------------------------------
    shown = np.unique(rows.documents)[: cfg.show * (2 if kind == "preference" else 1)]
    for number, document in enumerate(shown, 1):
        example = rows.document(int(document))
        sizes = f"{len(example.ids)} tokens, {int(example.mask.sum())} learned"
        title = f"document {number} of {found.documents:,}: {sizes}"
        report.tokens(title, pieces(tokenizer, example.ids.tolist()), example.mask.tolist())

    # ---- the report ----------------------------------------------------------------------------------------------
    lengths = np.concatenate([source.lengths for source in rows.sources])[rows.documents.reshape(-1)]
    png = Path(cfg.out) / "lengths.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    report.plot_lengths(lengths, cfg.data.max_length, png)
    report.histogram("tokens of a document", lengths)
    report.summary("data", {**dict(found.lines()), "length histogram": png})


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
