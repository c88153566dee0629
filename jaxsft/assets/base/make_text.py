"""Writes the text the base model was trained on: three public sources as jsonl rows {"text": ...}, a row a document.

    python jaxsft/assets/base/make_text.py --data DATA --out runs/base_text

The sources are not shipped; README.md beside this file says where they come from and under which licence. Every 20th
document of each source goes to `heldout.jsonl`, the others to `train.jsonl`, in the order of the sources.
"""

import argparse
import json
from pathlib import Path

HELDOUT_EVERY = 20
# UTF-8 quotes that were once read as Windows-1252. The source lost the last byte of closing quotes, so a bare "â€" is
# one of those and comes last. The stories without the fault have plain quotes.
MOJIBAKE = {"â€œ": '"', "â€™": "'", "â€": '"', "“": '"', "”": '"'}


def stories(path: Path) -> list[str]:
    """Reads TinyStories: a document a story, with its broken quotes mended."""
    documents = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    for broken, quote in MOJIBAKE.items():
        documents = [document.replace(broken, quote) for document in documents]
    return documents


def speeches(path: Path, least: int = 1000) -> list[str]:
    """Reads tiny Shakespeare: consecutive speeches, joined until a document has `least` characters.

    Speeches end at blank lines and are never cut, so a document is as much longer as its last speech makes it.
    """
    documents, group = [], ""
    for speech in path.read_text(encoding="utf-8").strip().split("\n\n"):
        group = f"{group}\n\n{speech}" if group else speech
        if len(group) >= least:
            documents.append(group)
            group = ""
    return [*documents, group] if group else documents


def poems(path: Path) -> list[str]:
    """Reads Tang poems: a document is title, author and lines, in simplified characters.

    Raises:
      ImportError: opencc, which converts the characters, is missing.
    """
    try:
        from opencc import OpenCC  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the poems are converted to simplified characters with opencc, which only this script needs; "
            "pip install opencc-python-reimplemented (Apache-2.0)"
        ) from error
    simplify = OpenCC("t2s").convert
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [simplify("\n".join([row["title"], row["author"], *row["paragraphs"]])) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sources")
    parser.add_argument("--out", type=Path, required=True, help="folder to write train.jsonl and heldout.jsonl into")
    args = parser.parse_args()

    sources = {
        "tinystories": stories(args.data / "text_tinystories/stories.jsonl"),
        "tinyshakespeare": speeches(args.data / "text_tinyshakespeare/input.txt"),
        "tang": poems(args.data / "text_chinese_poetry/poet.tang.0.json"),
    }
    heldout = [d for documents in sources.values() for d in documents[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]]
    train = [d for documents in sources.values() for i, d in enumerate(documents, 1) if i % HELDOUT_EVERY]

    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("train", train), ("heldout", heldout)):
        rows = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
        (args.out / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents))} characters")
    print(", ".join(f"{name} {len(documents)}" for name, documents in sources.items()))


if __name__ == "__main__":
    main()
