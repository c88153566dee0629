"""Who answers prompts, and what comes of it: the part of reinforcement learning that knows text."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from jaxsft import data, rewards, sample
from jaxsft.models import Model
from jaxsft.run import RunError
from jaxsft.sample import Samples
from jaxsft.types import Key


class Asked(NamedTuple):
    """Prompts: for the model, for people, and for reward functions."""

    ids: list[list[int]]
    texts: list[str]
    fields: list[dict[str, Any]]  # the other columns of each row


class Episodes(NamedTuple):
    """Answers to prompts, those to one prompt beside each other, and their rewards."""

    asked: Asked  # of each episode
    samples: Samples
    answers: list[str]
    scored: rewards.Scored
    seconds: float  # that it took to draw them

    @property
    def tokens(self) -> list[list[int]]:
        """The drawn tokens of each answer, the one that ended it included."""
        return [row[:size].tolist() for row, size in zip(self.samples.tokens, self.samples.lengths, strict=True)]

    @property
    def ended(self) -> Bool[np.ndarray, "N"]:
        """Which answers a stop token or string ended; the others were cut."""
        return self.samples.finish != sample.LENGTH


Act = Callable[..., Episodes]  # (policy's variables, prompts, *, samples, key)


def act(model: Model, tokenizer: Any, stop: Sequence[int], how: sample.Config, judge: rewards.Judge) -> Act:
    """Makes (variables, asked, *, samples, key) -> Episodes.

    Args:
      model: the policy's.
      tokenizer: of the run.
      stop: tokens that end an answer.
      how: answers are drawn.
      judge: the reward functions; on several hosts the first one's judgement counts.
    """
    strings = sample.stops.compile(how.stop, tokenizer) if how.stop else None
    kept = {"max_new_tokens": how.max_new_tokens, "draw": how.draw, "stop": stop, "strings": strings}
    write = functools.partial(sample.generate, model, **kept)

    def episodes(variables: Mapping, asked: Asked, *, samples: int, key: Key) -> Episodes:
        start = time.perf_counter()
        found = write(variables, asked.ids, samples=samples, key=key)
        seconds = time.perf_counter() - start
        again = lambda part: [one for one in part for _ in range(samples)]
        repeated = Asked(again(asked.ids), again(asked.texts), again(asked.fields))
        answers = sample.texts(found, tokenizer, how.stop)
        written = zip(repeated.fields, sample.answers(found), strict=True)
        scored = judge(repeated.texts, answers, [{**fields, "completion_ids": ids} for fields, ids in written])
        if jax.process_count() > 1:
            total, parts = multihost_utils.broadcast_one_to_all((scored.total, scored.parts))
            scored = scored._replace(total=np.asarray(total), parts={k: np.asarray(v) for k, v in parts.items()})
        return Episodes(repeated, found, answers, scored, seconds)

    return episodes


def ask(rows: data.PromptRows, numbers: Sequence[int], tokenizer: Any) -> Asked:
    """Takes prompts of the data by number."""
    ids = [rows.document(int(rows.documents[i])).ids.tolist() for i in numbers]
    texts = [data.said_last(tokenizer.decode(one), tokenizer) for one in ids]
    return Asked(ids, texts, [rows.fields(int(i)) for i in numbers])


def examination(
    act: Act,
    held_out: data.PromptRows | None,
    tokenizer: Any,
    *,
    seed: int,
    score: Callable[[Sequence[Sequence[int]]], Sequence[float]] | None = None,
    weight: float = 0.0,
) -> Callable[[Mapping], Episodes] | None:
    """Makes policy -> judged answers to all held-out prompts, drawn alike every time; None where there are none.

    Args:
      act: how they are answered, one answer each.
      held_out: the prompts.
      tokenizer: of the run.
      seed: of the draws.
      score: of a reward model, for texts as token ids; it counts `weight`.
    """
    if held_out is None:
        return None
    asked = ask(held_out, range(len(held_out)), tokenizer)

    def examine(policy: Mapping) -> Episodes:
        found = act(policy, asked, samples=1, key=jax.random.key(seed))
        if score is None:
            given(found, penalty=None, judged=False)  # refuses where no answer has a reward
            return found
        scores = np.array(score([ids + answer for ids, answer in zip(asked.ids, found.tokens, strict=True)]))
        total = given(found, penalty=None, judged=True) + weight * scores
        scored = found.scored._replace(total=total, parts={**found.scored.parts, "model": scores})
        return found._replace(scored=scored)

    return examine


def taken(batch: Int[np.ndarray, "B"]) -> list[int]:
    """The rows of a batch; where it was filled up with empty ones, its first rows come again.

    Example:
      >>> taken(np.array([4, 2, 7, -1, -1]))
      [4, 2, 7, 4, 2]
    """
    return np.resize(batch[batch >= 0], len(batch)).tolist()


def given(episodes: Episodes, *, penalty: float | None, judged: bool) -> Float[np.ndarray, "N"]:
    """The rewards of functions, less the penalty of answers that were cut.

    Args:
      episodes: what was drawn.
      penalty: of an answer without an end; None for none.
      judged: does a reward model judge, too? An answer that no function has a reward for then has that one's alone.

    Raises:
      RunError: no answer has a reward, so that nothing can be learned.
    """
    total = np.nan_to_num(episodes.scored.total) if judged else episodes.scored.total
    if np.isnan(total).all():
        raise RunError(rewards.trouble(episodes.scored))
    return (total - (penalty or 0.0) * ~episodes.ended).astype(np.float32)


def figures(episodes: Episodes) -> dict[str, float]:
    """What is told of episodes: the mean reward of each function, lengths, how many ended, how many rewards failed."""
    parts = {f"reward_{name}": np.nanmean(x) for name, x in episodes.scored.parts.items() if np.isfinite(x).any()}
    told = {"length": episodes.samples.lengths.mean(), "ended": episodes.ended.mean()}
    return {name: float(value) for name, value in (parts | told).items()} | {"failures": len(episodes.scored.failures)}


def failed(episodes: Episodes) -> list[dict[str, Any]]:
    """What reward functions could not judge, as rows for people."""
    return [failure._asdict() for failure in episodes.scored.failures]


def lines(episodes: Episodes, rewards: Float[np.ndarray, "N"]) -> list[dict[str, Any]]:
    """Episodes as rows for people: prompt, answer, reward, that of each function, whether it ended, what was wanted."""
    number = lambda x: round(float(x), 6) if np.isfinite(x) else None
    rows = []
    for i, (prompt, answer) in enumerate(zip(episodes.asked.texts, episodes.answers, strict=True)):
        parts = {f"reward_{name}": number(x[i]) for name, x in episodes.scored.parts.items()}
        row = {"prompt": prompt, "answer": answer, "reward": number(rewards[i]), **parts}
        wanted = episodes.asked.fields[i].get("answer")
        rows.append(row | {"ended": bool(episodes.ended[i])} | ({"wanted": str(wanted)} if wanted is not None else {}))
    return rows
