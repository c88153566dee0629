"""A conversation: an answer as it comes, from a model alone or from what a search finds on the question.

question -> a query that stands alone (the model's own words, if it is a follow-up) -> search -> near enough?
  no:  "I do not know.", and the model is not asked
  yes: passages that fit -> the model's answer -> the sources that it names
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxsft import sample
from jaxsft.data import Message, prompt_ids
from jaxsft.models import Model
from jaxsft.rag import answer, search
from jaxsft.rag.records import Hit
from jaxsft.types import Key
from jaxsft.voice import Voice

LONGEST_QUERY = 96  # tokens of a follow-up question in the model's own words


@dataclass(frozen=True)
class Config:
    """How a question is answered from documents."""

    k: int = 5
    """passages that the model is shown at most; fewer, if it has no room for them"""
    mode: Literal["hybrid", "dense", "text"] = "hybrid"
    """search by words and meaning, by meaning alone, or by words alone"""
    where: list[str] = field(default_factory=list)
    """filters, key=value or key!=value with * for anything: source, title, heading, kind, page, or any tag"""
    rerank: str = ""
    """a folder or hub name of a cross encoder that puts the best candidates in order"""
    diversity: float = 0.0
    """from 0 to 1, how much the passages are to differ from each other"""
    embedder: str = ""
    """the encoder that the store was made with, where it lies elsewhere now"""
    threshold: float = 0.3
    """where no passage has this similarity (cosine) to the question, the answer is that nothing is known"""
    followups: Literal["rewrite", "join", "off"] = "rewrite"
    """what is searched for in a conversation: the question as the model writes it to stand alone; the question behind
    the one before it (for small models); or the question as it is"""


class Found(NamedTuple):
    """What there is to answer a question from."""

    query: str  # that was searched for
    hits: tuple[Hit, ...]  # best first
    asked: answer.Asked | None  # how the model reads it; None where nothing is near enough


class Speaker(NamedTuple):
    """A model, whose words it speaks, and how they are drawn."""

    model: Model
    who: Voice
    how: sample.Config

    def say(self, prompt: Sequence[int], key: Key) -> Iterator[str]:
        """Answers a prompt, piece by piece."""
        tokens = sample.stream(
            self.model,
            self.who.variables,
            prompt,
            max_new_tokens=self.how.max_new_tokens,
            draw=self.how.draw,
            stop=self.who.stop,
            strings=self.who.strings,
            key=key,
        )
        return sample.pieces(self.who.tokenizer, tokens, self.how.stop)

    def show(self, prompt: Sequence[int], key: Key) -> str:
        """Prints the answer as it comes."""
        said = ""
        for piece in self.say(prompt, key):
            print(piece, end="", flush=True)
            said += piece
        print()
        return said

    @property
    def room(self) -> int:
        """The most tokens of a prompt."""
        return self.model.config.max_position - self.how.max_new_tokens


def searcher(store: str, config: Config) -> Callable[[str], list[Hit]]:
    """Opens a store, to be searched in the way that a configuration says.

    Raises:
      RunError, CheckpointError: see `rag.search.load`.
    """
    opened = search.load(store, embedder=config.embedder, rerank=config.rerank, mode=config.mode)
    how = {"k": config.k, "mode": config.mode, "where": config.where, "diversity": config.diversity}
    return lambda query: opened.find(query, **how)


def look_up(
    question: str,
    find: Callable[[str], Sequence[Hit]],
    speaker: Speaker,
    config: Config,
    *,
    history: Sequence[Message] = (),
) -> Found:
    """Searches for a question, and writes what was found into a prompt.

    Args:
      question: the last turn.
      find: query -> passages, best first; see `searcher`.
      speaker: who will answer.
      config: what counts as found.
      history: the turns before the question.

    Raises:
      RunError: the question does not fit into the model; see `answer.fit`.
    """
    query = _query(question, speaker, config, history)
    hits = tuple(find(query))
    if not answer.relevant(hits, config.threshold):
        return Found(query, hits, None)
    return Found(query, hits, answer.fit(question, hits, speaker.who.tokenizer, speaker.room, history=history))


def _query(question: str, speaker: Speaker, config: Config, history: Sequence[Message]) -> str:
    """What to search for."""
    before = [message.content for message in history if message.role == "user"]
    if not before or config.followups == "off":
        return question
    joined = f"{before[-1]} {question}"
    if config.followups == "join":
        return joined
    prompt = prompt_ids(answer.alone(question, history), speaker.who.tokenizer)
    room = speaker.model.config.max_position - LONGEST_QUERY
    tokens = sample.stream(
        speaker.model, speaker.who.variables, prompt[-room:], max_new_tokens=LONGEST_QUERY, stop=speaker.who.stop
    )
    said = "".join(sample.pieces(speaker.who.tokenizer, tokens)).strip()
    return said.splitlines()[0] if said else joined


def reply(
    question: str,
    find: Callable[[str], Sequence[Hit]],
    speaker: Speaker,
    config: Config,
    key: Key,
    *,
    history: Sequence[Message] = (),
    passages: bool = False,
) -> str:
    """Answers a question from what is found, as it comes, and prints what the numbers in the answer stand for.

    Args:
      question, find, speaker, config, history: as for `look_up`.
      key: of the draws.
      passages: print what the model is shown, too.

    Returns:
      the answer alone.
    """
    found = look_up(question, find, speaker, config, history=history)
    if found.query != question:
        print(f"  searching: {found.query}")
    if found.asked is None:
        print(nothing(found, config.threshold))
        return answer.UNKNOWN
    if passages:
        print(answer.messages(question, found.asked.hits)[-1].content, end="\n\n")
    said = speaker.show(found.asked.ids, key)
    for line in answer.sources(said, found.asked.hits):
        print(f"  {line}")
    return said


def nothing(found: Found, threshold: float) -> str:
    """Tells why there is no answer.

    Example:
      >>> from jaxsft.rag.records import Passage
      >>> nothing(Found("?", (Hit(Passage("", "a.md"), 1.0, similarity=0.123),), None), 0.3)
      'I do not know. (nearest: similarity 0.12 in a.md; 0.30 is needed)'
      >>> nothing(Found("?", (), None), 0.3)
      'I do not know. (nothing found)'
    """
    known = [hit for hit in found.hits if hit.similarity is not None]
    if not known:
        return f"{answer.UNKNOWN} (nothing found)"
    best = max(known, key=lambda hit: hit.similarity or 0.0)
    near = f"nearest: similarity {best.similarity:.2f} in {best.passage.source}; {threshold:.2f} is needed"
    return f"{answer.UNKNOWN} ({near})"
