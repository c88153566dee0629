"""Generation: answers to many prompts at once, and one answer as it comes."""

from jaxsft.sample import stops
from jaxsft.sample.ask import asker, filler
from jaxsft.sample.draw import GREEDY, Config, Draw, pick
from jaxsft.sample.generate import SLOTS, Samples, answers, check, generate, texts
from jaxsft.sample.loop import LENGTH, STOP_STRING, STOP_TOKEN
from jaxsft.sample.stops import Strings, until
from jaxsft.sample.stream import pieces, stream

__all__ = [
    "GREEDY",
    "LENGTH",
    "SLOTS",
    "STOP_STRING",
    "STOP_TOKEN",
    "Config",
    "Draw",
    "Samples",
    "Strings",
    "answers",
    "asker",
    "check",
    "filler",
    "generate",
    "pick",
    "pieces",
    "stops",
    "stream",
    "texts",
    "until",
]
