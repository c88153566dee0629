"""A file's bytes as text, or the reason why they are none."""

import codecs
from pathlib import Path

from jaxsft.run import RunError

MAX_BYTES = 100_000_000  # of a file that is read whole; its text and what is cut out of it lie in memory together
SAMPLE = 1 << 20  # bytes that an encoding is guessed from
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
PLAIN = "\t\n\r\f\v\x1b\x85"  # control characters that texts do have
JUNK = 0.01  # the share of other control characters from which on it is no text


class ReadError(RunError):
    """A file that cannot be read; its attributes are what the message says."""

    def __init__(self, file: str | Path, reason: str, remedy: str):
        super().__init__(f"{file}: {reason}; {remedy}")
        self.file, self.reason, self.remedy = str(file), reason, remedy


def encoding(path: Path) -> str:
    """The encoding of a text file: by its mark, UTF-8 if all of it is, or else a guess.

    Raises:
      ReadError: none fits.
    """
    with path.open("rb") as file:
        start = file.read(SAMPLE)
        for mark, name in MARKS.items():
            if start.startswith(mark):
                return name
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            piece = start
            while piece:
                decoder.decode(piece)
                piece = file.read(SAMPLE)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return _guess(path, start)
    return "utf-8"


def _guess(path: Path, start: bytes) -> str:
    from charset_normalizer import from_bytes

    if b"\0" in start:  # of UTF-16 without a mark, or no text at all
        raise _no_text(path)
    best = from_bytes(start).best()
    if best is None:
        raise _no_text(path)
    return best.encoding


def _no_text(path: Path) -> ReadError:
    return ReadError(
        path, f"is no text, though it is named {path.suffix}", "give it its own ending, or save it as UTF-8"
    )


def check(path: Path, text: str) -> str:
    """The text, if it is one.

    Raises:
      ReadError: it has NUL characters, or many other control characters: some other kind of file.
    """
    controls = sum(map(text.count, CONTROLS))
    if "\0" in text or controls > JUNK * len(text):
        raise _no_text(path)
    return text


CONTROLS = [chr(i) for i in (*range(32), *range(127, 160)) if chr(i) not in PLAIN]


def text(path: Path) -> str:
    """The whole text of a file, line ends as they are.

    Raises:
      ReadError: see `encoding` and `check`.
    """
    name = encoding(path)
    try:
        return check(path, path.read_bytes().decode(name))
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is not {name}"
        raise ReadError(path, f"is no text in one encoding ({where})", "save it as UTF-8") from None
