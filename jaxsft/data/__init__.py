"""Data: rows from files and the hub, read in one of the `FORMATS`, tokenised, packed and streamed."""

from jaxsft.data import images, pixels
from jaxsft.data.buckets import LoadedPrompts, PromptRows, batches_by_length, load_prompts
from jaxsft.data.chat import (
    Completion,
    Conversation,
    Image,
    Message,
    Passage,
    Preference,
    Prompt,
    Text,
    ToolCall,
    Unpaired,
)
from jaxsft.data.contrasts import ContrastRows
from jaxsft.data.formats import FORMATS, Format, detect, parse
from jaxsft.data.gaps import Masking, masking
from jaxsft.data.info import Source, resolve
from jaxsft.data.load import Config, Loaded, Report, cache, kind_of, load, records
from jaxsft.data.pairs import LoadedPairs, PackedPairs, load_pairs, pairs_in_memory
from jaxsft.data.questions import Comparison, Question, blanks, comparisons, questions, said_last
from jaxsft.data.render import Example, prompt_ids, render, render_text
from jaxsft.data.rows import Bad, DataError, Row
from jaxsft.data.script import How
from jaxsft.data.sources import read, scan
from jaxsft.data.store import expect_tokens
from jaxsft.data.stream import (
    Batch,
    PackedRows,
    batches,
    in_memory,
    steps_per_epoch,
)
from jaxsft.data.templates import TEMPLATES, with_template

__all__ = [
    "FORMATS",
    "TEMPLATES",
    "Bad",
    "Batch",
    "Comparison",
    "Completion",
    "Config",
    "ContrastRows",
    "Conversation",
    "DataError",
    "Example",
    "Format",
    "How",
    "Image",
    "Loaded",
    "LoadedPairs",
    "LoadedPrompts",
    "Masking",
    "Message",
    "PackedPairs",
    "PackedRows",
    "Passage",
    "Preference",
    "Prompt",
    "PromptRows",
    "Question",
    "Report",
    "Row",
    "Source",
    "Text",
    "ToolCall",
    "Unpaired",
    "batches",
    "batches_by_length",
    "blanks",
    "cache",
    "comparisons",
    "detect",
    "expect_tokens",
    "images",
    "in_memory",
    "kind_of",
    "load",
    "load_pairs",
    "load_prompts",
    "masking",
    "pairs_in_memory",
    "parse",
    "pixels",
    "prompt_ids",
    "questions",
    "read",
    "records",
    "render",
    "render_text",
    "resolve",
    "said_last",
    "scan",
    "steps_per_epoch",
    "with_template",
]
