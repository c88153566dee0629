"""Data: rows from files and the hub, read in one of the `FORMATS`, tokenised, packed and streamed."""

from jaxsft.data.chat import Conversation, Example, Message, Text, prompt_ids, render, render_text, with_template
from jaxsft.data.formats import FORMATS, Format, detect, parse
from jaxsft.data.questions import Question, questions
from jaxsft.data.sources import DataError, Row, read
from jaxsft.data.stream import Batch, Config, PackedRows, Report, batches, load, steps_per_epoch

__all__ = [
    "FORMATS",
    "Batch",
    "Config",
    "Conversation",
    "DataError",
    "Example",
    "Format",
    "Message",
    "PackedRows",
    "Question",
    "Report",
    "Row",
    "Text",
    "batches",
    "detect",
    "load",
    "parse",
    "prompt_ids",
    "questions",
    "read",
    "render",
    "render_text",
    "steps_per_epoch",
    "with_template",
]
