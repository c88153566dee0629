"""Answers all prompts of a file, several times each if wanted, with or without an adapter.

    python scripts/generate.py --config configs/generate.yaml
    python scripts/generate.py --model runs/sft/merged --data.train questions.jsonl --run.output_dir runs/answers
    python scripts/generate.py --model BASE --adapter runs/sft/adapter --data.train prompts.jsonl --samples 8 \
        --sample.temperature 0.8 --sample.top_p 0.95 --sample.stop '["\n\n"]'

Rows are prompts, conversations or completions of any format of docs/data.md; of the last two all but the last answer is
asked. `generated_predictions.jsonl` gets a row {"prompt", "predict", "label"} for each answer, as they come; a run that
was stopped goes on with --run.resume true.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxsft import config, data, hub, predictions, report, run, sample, sections, sharding, voice
from jaxsft.predictions import Prediction


@dataclass(frozen=True)
class Config:
    """Who answers what, and how."""

    model: str = ""
    """a folder with config.json and safetensors, or a hub name"""
    adapter: str = ""
    """an adapter folder in PEFT's format, to put on the model"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and computation"""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """keep the kernels of the layers as int8 or nf4, as for model.quantise"""
    samples: int = 1
    """answers to each prompt, which is read once for all of them"""
    slots: int = sample.SLOTS
    """answers in progress at one time; each holds a cache of a prompt and an answer in memory"""
    queue: int = 256
    """prompts that wait for slots at one time; their answers are written together"""
    label: str = "answer"
    """the column of prompts that has the wanted answer; conversations and completions have their own"""
    data: sections.Data = sections.Data()
    sample: sections.Sample = sections.Sample()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run(output_dir="runs/answers")


FREE = ("run.", "mesh.", "data.cache", "data.workers", "slots", "queue")  # settings that decide no answer


def begin(cfg: Config, folder, count: int) -> int:
    """How many prompts are answered already; what lies behind their answers is taken out."""
    done = 0
    if jax.process_index() == 0:
        settings = {key: x for key, x in config.flat(cfg).items() if not key.startswith(FREE)}
        predictions.settle(folder, settings | {"prompts": count})
        done = len(predictions.read(folder)) // cfg.samples
        predictions.keep(folder, done * cfg.samples)
    return int(multihost_utils.broadcast_one_to_all(np.int32(done))) if jax.process_count() > 1 else done


def label(fields: dict[str, Any], column: str) -> str:
    """The wanted answer of a row, "" where it has none."""
    wanted = fields.get(column, "")
    return wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    if cfg.samples < 1 or cfg.slots < 1 or cfg.queue < 1:
        raise run.RunError(f"samples, slots and queue are {cfg.samples}, {cfg.slots} and {cfg.queue}; 1 is the least")
    folder = run.start(cfg.run)
    mesh = sharding.mesh(**dataclasses.asdict(cfg.mesh))

    # ---- who answers what ----------------------------------------------------------------------------------------
    dtype = jnp.dtype(cfg.dtype)
    model, base = hub.load_variables(cfg.model, mesh, quantise=cfg.quantise, dtype=dtype)
    how = {"adapter": cfg.adapter, "template": cfg.data.template, "strings": cfg.sample.stop, "mesh": mesh}
    who = voice.load(cfg.model, model, base, **how)
    rows, _, found = data.load_prompts(cfg.data, who.tokenizer)
    report.summary("data", dict(found.lines()))
    ids = lambda i: rows.document(int(rows.documents[i])).ids.tolist()
    sample.check(model, who.variables, [ids(int(np.argmax(rows.lengths)))], cfg.sample.max_new_tokens)

    # ---- the answers ---------------------------------------------------------------------------------------------
    n, key = cfg.samples, jax.random.key(cfg.sample.seed)
    done = begin(cfg, folder, len(rows))
    log = run.Log(folder, done, shows="length")
    with log.progress(len(rows), "prompts"):
        for start in range(done, len(rows), cfg.queue):
            numbers = range(start, min(start + cfg.queue, len(rows)))
            prompts = [ids(i) for i in numbers]
            answers = sample.generate(
                model,
                who.variables,
                prompts,
                max_new_tokens=cfg.sample.max_new_tokens,
                draw=cfg.sample.draw,
                stop=who.stop,
                strings=who.strings,
                samples=n,
                slots=cfg.slots,
                key=key,
                seeds=range(numbers.start * n, numbers.stop * n),
            )
            texts = sample.texts(answers, who.tokenizer, cfg.sample.stop)
            asked = [who.tokenizer.decode(prompt) for prompt in prompts]
            wanted = [label(rows.fields(i), cfg.label) for i in numbers]
            written = [Prediction(asked[i // n], text, wanted[i // n]) for i, text in enumerate(texts)]
            if jax.process_index() == 0:
                predictions.append(folder, written)
            figures = {
                "length": float(answers.lengths.mean()),
                "ended": float((answers.finish != sample.LENGTH).mean()),
            }
            log.train(numbers.stop, figures, int(answers.lengths.sum()))

    # ---- what there is to see ------------------------------------------------------------------------------------
    if jax.process_index():
        return
    all_of_them, shown = predictions.read(folder), cfg.run.samples
    some = np.unique(np.linspace(0, len(all_of_them) - 1, min(shown, len(all_of_them))).round().astype(int))
    few = [all_of_them[i] for i in some]
    cells = [(data.said_last(one.prompt, who.tokenizer), one.predict, one.label) for one in few]
    report.table("some of the answers", ("prompt", "answer", "wanted"), cells)
    lines = run.read_metrics(folder / run.METRICS)
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    told = {"answers": f"{len(all_of_them):,}", "tokens a second": f"{speed[-1]:,.0f}" if speed else "-"}
    report.summary("result", told | {"written to": folder / predictions.FILE})


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
