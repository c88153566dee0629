"""Passages, tuning, or both? The same questions, asked of a model in four ways, before and after the documents change.

    python scripts/compare.py --config configs/compare.yaml
    python scripts/compare.py --base BASE --tuned runs/mine/adapter --docs handbook --questions questions.jsonl
    python scripts/compare.py --base BASE --docs handbook --questions questions.jsonl --changed handbook_2027 \
        --changed_questions questions_2027.jsonl

Questions are rows {"question", "answer", "source"}: an answer is a text, or a list of which each one is right; a source
is the file that has it. What is not given is left out: without --tuned there are two ways, without --changed one round.
The folder of the run gets compare.html (one page with a recommendation and what it stands on), compare.png and
replies.jsonl.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import config, data, hub, report, run, sample, sections, voice
from jaxsft.models import Model
from jaxsft.rag import answer, compare, embed, page, rows, search, store, verdict
from jaxsft.rag import index as indexing
from jaxsft.rag.compare import Reply, Round
from jaxsft.rag.rows import Question


@dataclass(frozen=True)
class Config:
    """What is compared, and by which questions."""

    base: str = ""
    """the model before tuning: a folder with config.json and safetensors, or a hub name"""
    tuned: str = ""
    """what tuning left: an adapter folder in PEFT's format for base, or a whole model"""
    docs: str = ""
    """the folder of documents"""
    questions: str = ""
    """rows {"question", "answer", "source"} about the documents"""
    changed: str = ""
    """the folder of the documents as they are later; asks all again"""
    changed_questions: str = ""
    """the questions with the answers that are right then"""
    embedder: str = ""
    """a folder or hub name of a sentence encoder; by default all-MiniLM-L6-v2"""
    mode: Literal["hybrid", "dense", "text"] = "hybrid"
    """search by words and meaning, by meaning alone, or by words alone"""
    k: int = 3
    """passages that are shown at most"""
    size: int = 128
    """tokens of a passage at most"""
    threshold: float = 0.3
    """where no passage has this similarity to the question, the answer is that nothing is known"""
    timed: int = 9
    """questions that are asked one by one to time an answer; 0 for none"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and computation"""
    template: str = ""
    """a chat template by name, or a .jinja file; by default the adapter's or the model's own"""
    sample: sections.Sample = sections.Sample(max_new_tokens=48, temperature=0.0)
    run: sections.Run = sections.Run(output_dir="runs/compare")


class Speaker(NamedTuple):
    """A model with its voice."""

    model: Model
    who: voice.Voice


def speakers(cfg: Config) -> dict[str, Speaker]:
    """The base, and what tuning left, by the way that they answer alone."""
    load = lambda path: hub.load_variables(path, dtype=jnp.dtype(cfg.dtype))
    how: dict[str, Any] = {"template": cfg.template, "strings": cfg.sample.stop}
    model, variables = load(cfg.base)
    found = {compare.BASE: Speaker(model, voice.load(cfg.base, model, variables, **how))}
    if cfg.tuned and (Path(cfg.tuned) / "adapter_config.json").exists():
        found[compare.TUNED] = Speaker(model, voice.load(cfg.base, model, variables, adapter=cfg.tuned, **how))
    elif cfg.tuned:
        other, variables = load(cfg.tuned)
        found[compare.TUNED] = Speaker(other, voice.load(cfg.tuned, other, variables, **how))
    return found


def searcher(cfg: Config, docs: str, folder: Path) -> search.Searcher:
    """Brings a store in the run's folder up to date with some documents."""
    embedder = embed.load(cfg.embedder)
    size = min(cfg.size, embedder.max_tokens)
    about = store.About(embedder.name, embedder.digest, embedder.dim, size, overlap=0)
    with store.writing(str(folder)):
        found = store.open(str(folder), embedder) if store.exists(str(folder)) else store.create(str(folder), about)
        found = found if found.about == about else store.describe(found, about)
        failed = indexing.update(found, Path(docs), embedder).failed
    if failed:
        report.table("files that could not be read", ("file", "reason"), failed, lines=False)
    return search.Searcher(found, embedder)


def ask(cfg: Config, speaker: Speaker, find: search.Searcher | None, questions: Sequence[str]) -> list[Reply]:
    """Asks some questions together, with passages or without."""
    tokenizer, room = speaker.who.tokenizer, speaker.model.config.max_position - cfg.sample.max_new_tokens
    hits = find.find_all(questions, k=cfg.k, mode=cfg.mode) if find else [[] for _ in questions]
    prompts, shown = [], []
    for question, those in zip(questions, hits, strict=True):
        if find is None:
            prompts.append(data.prompt_ids([data.Message("user", question)], tokenizer))
            shown.append(())
        elif answer.relevant(those, cfg.threshold):
            asked = answer.fit(question, those, tokenizer, room)
            prompts.append(asked.ids)
            shown.append(asked.hits)
        else:
            shown.append(None)
    said = iter(_say(cfg, speaker, prompts))
    return [Reply(answer.UNKNOWN) if those is None else Reply(next(said), those) for those in shown]


def _say(cfg: Config, speaker: Speaker, prompts: Sequence[Sequence[int]]) -> list[str]:
    ask = sample.asker(speaker.model, speaker.who.tokenizer, prompts, speaker.who.stop, cfg.sample)
    return ask(speaker.who.variables)


def timed(cfg: Config, speaker: Speaker, find: search.Searcher | None, questions: list[str]) -> float:
    """The median time of a question that is asked alone, in seconds, search included."""
    some = [questions[i] for i in np.linspace(0, len(questions) - 1, cfg.timed).round().astype(int)]
    times = []
    for question in [*some, *some]:  # the first time compiles
        began = time.perf_counter()
        ask(cfg, speaker, find, [question])
        times.append(time.perf_counter() - began)
    return float(np.median(times[len(some) :]))


def check(cfg: Config) -> None:
    """Tells what is missing before anything is loaded."""
    for name in ("base", "docs", "questions"):
        if not getattr(cfg, name):
            raise run.RunError(f"--{name} is not given; base, docs and questions are needed, see --help")
    if bool(cfg.changed) != bool(cfg.changed_questions):
        raise run.RunError("give both --changed and --changed_questions, or neither")


def answers(asked: Round, count: int) -> page.Table:
    """Some questions with all answers."""
    some = np.unique(np.linspace(0, len(asked.questions) - 1, min(count, len(asked.questions))).round().astype(int))
    names = page.arms(asked)
    cells = [[asked.replies[name][i].text for name in names] for i in some]
    rows = [(asked.questions[i].question, asked.questions[i].answers[0], *c) for i, c in zip(some, cells, strict=True)]
    return page.Table(f"{asked.name}: some answers", ("question", "wanted", *names), rows)


def write(file: Path, rounds: Sequence[Round]) -> None:
    """All replies, a line each."""
    lines = [
        {"round": one.name, "way": arm, "question": q.question, "wanted": q.answers, "answer": reply.text}
        | {"source": q.source, "passages": [hit.passage.source for hit in reply.hits]}
        for one in rounds
        for arm, replies in one.replies.items()
        for q, reply in zip(one.questions, replies, strict=True)
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def main(cfg: Config) -> None:
    # ---- who is asked what ---------------------------------------------------------------------------------------
    check(cfg)
    folder = run.start(cfg.run)
    asked: list[tuple[str, str, list[Question]]] = [("documents", cfg.docs, rows.read(cfg.questions))]
    if cfg.changed:
        asked.append(("changed documents", cfg.changed, rows.read(cfg.changed_questions)))
    voices = speakers(cfg)

    # ---- the answers ---------------------------------------------------------------------------------------------
    rounds, tables = [], []
    for name, docs, questions in asked:
        find = searcher(cfg, docs, folder / "store")
        texts = [one.question for one in questions]
        ways = {compare.BASE: (compare.BASE, None), compare.RAG: (compare.BASE, find)}
        ways |= {compare.TUNED: (compare.TUNED, None), compare.BOTH: (compare.TUNED, find)}
        there = {way: (voices[who], how) for way, (who, how) in ways.items() if who in voices}
        replies = {way: ask(cfg, speaker, how, texts) for way, (speaker, how) in there.items()}
        seconds = {way: timed(cfg, *pair, texts) for way, pair in there.items()} if cfg.timed else {}
        rounds.append(Round(name, questions, replies))
        tables.append(page.figures(rounds[-1], seconds))
        report.table(*tables[-1])
    if cfg.changed:
        tables.append(page.by_fate(*rounds))
        report.table(*tables[-1])

    # ---- what follows --------------------------------------------------------------------------------------------
    seen = verdict.findings(*rounds)
    advice = verdict.recommend(seen)
    report.table(
        "findings", ("", "finding", "evidence"), [("yes" if f.holds else "no", *f[:2]) for f in seen], lines=False
    )
    write(folder / "replies.jsonl", rounds)
    page.plot(rounds, folder / "compare.png")
    about = {
        "base": cfg.base,
        "tuned": cfg.tuned or "-",
        "documents": cfg.docs,
        "changed documents": cfg.changed or "-",
    }
    about |= {"passages": f"{cfg.k} of at most {cfg.size} tokens, mode {cfg.mode}", "device": str(jax.devices()[0])}
    spent = compare.cost(Path(cfg.tuned).parent / run.METRICS) if cfg.tuned else None
    about |= {"training of tuned": str(spent)} if spent else {}
    html = page.page(
        advice, seen, [*tables, *(answers(one, 12) for one in rounds)], folder / "compare.png", about, page.notes()
    )
    (folder / "compare.html").write_text(html, encoding="utf-8")
    report.summary("result", {"recommendation": advice, "report": folder / "compare.html", **about})


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
