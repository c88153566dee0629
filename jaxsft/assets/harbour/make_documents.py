"""Writes the documents of a harbour town, what is asked about them, and lessons about other towns.

    python jaxsft/assets/harbour/make_documents.py                      the town, into this folder
    python jaxsft/assets/harbour/make_documents.py --lessons FOLDER     lessons, into another one

documents/, questions.jsonl                  the town, and a question about each fact: {"question", "answer", "source"}
documents_changed/, questions_changed.jsonl  the same town some years later: facts that changed, are gone, are new
study.jsonl                                  the facts of documents/ asked in other words, to be learned by heart
FOLDER/documents/, FOLDER/questions.jsonl    places that the town does not have, to learn to read from

An answer is a sentence of the documents, in lessons also all that is told of a place. All names and numbers are drawn,
so none can be known without reading.
"""

import argparse
import csv
import io
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
UNKNOWN = "I do not know."

ADJECTIVES = """
red old new little big long high small blue green white black north south east west upper lower
dark bright quiet cold warm dry round square narrow wide golden silver stone wooden iron empty
happy lucky grey brown
""".split()
NOUNS = """
boat house tree garden park tower bridge mill well shop school inn market lamp church hall pier
library farm barn gate wall road hill lake pond field beach cave ship cart bakery kitchen bank
court castle cabin hut yard dock island stable chapel museum theatre station office cellar spring
orchard meadow street
""".split()
NAMES = """
Tom Lily Tim Sara Ben Mia Jack Sam John Henry Edward Anna Lucy Bob Jane Emma Amy Kate Joe Leo Ella
Rose Max Sue Peter Mary Thomas George Molly Daisy
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLOURS = "red blue green white black yellow brown pink grey".split()
THINGS = "cat dog bird fish bear tree boat ball box book bed hat bell cake apple drum clock chair cup map".split()


class Kind(NamedTuple):
    """A kind of fact."""

    says: str  # the sentence of a place and a value
    asked: tuple[str, ...]  # the first in questions.jsonl, the others in study.jsonl
    values: Sequence[str]


numbers = lambda first, last: tuple(map(str, range(first, last + 1)))
ENGLISH = (
    Kind("The keeper of the {e} is {v}.", ("Who is the keeper of the {e}?", "Who keeps the {e}?"), NAMES),
    Kind("The owner of the {e} is {v}.", ("Who is the owner of the {e}?", "Who owns the {e}?"), NAMES),
    Kind("The {e} opens at {v}.", ("When does the {e} open?", "At what time does the {e} open?"), numbers(5, 12)),
    Kind("The {e} closes at {v}.", ("When does the {e} close?", "At what time does the {e} close?"), numbers(13, 23)),
    Kind("The {e} is closed on {v}.", ("On which day is the {e} closed?", "Which day is the {e} closed?"), DAYS),
    Kind(
        "A visit to the {e} costs {v} pence.",
        ("What does a visit to the {e} cost?", "How much is a visit to the {e}?"),
        numbers(2, 99),
    ),
    Kind(
        "The door of the {e} is {v}.",
        ("What colour is the door of the {e}?", "Which colour has the door of the {e}?"),
        COLOURS,
    ),
    Kind(
        "The {e} was built in {v}.",
        ("When was the {e} built?", "In which year was the {e} built?"),
        numbers(1700, 1999),
    ),
    Kind("In the {e} there is a {v}.", ("What is there in the {e}?", "What can be found in the {e}?"), THINGS),
)
CHINESE = (
    Kind(
        "{e}的主人是{v}。", ("谁是{e}的主人？", "{e}的主人是谁？"), [a + b for a in "李王张白" for b in "山月云风花水"]
    ),
    Kind("{e}的门是{v}色的。", ("{e}的门是什么颜色的？", "{e}的门是什么色的？"), "红白青黄金黑"),
    Kind("{e}建于{v}年。", ("{e}建于哪一年？", "{e}是哪一年建的？"), numbers(1700, 1999)),
    Kind("{e}有{v}人。", ("{e}有多少人？", "{e}里有多少人？"), numbers(2, 99)),
)
PLACES = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
PLACES_CHINESE = [a + b for a in "红老小大高白青金石长东西南北" for b in "船塔桥门楼亭井店园屋寺村"]
FACTS = 3  # of a place
ABOUT = ("What is known of the {e}?", "{e}怎么样？")


class Fact(NamedTuple):
    """What is true of a place."""

    kind: Kind
    place: str
    value: str

    @property
    def sentence(self) -> str:
        return self.kind.says.format(e=self.place, v=self.value)

    def question(self, number: int = 0) -> str:
        return self.kind.asked[number].format(e=self.place)


File = tuple[str, list[list[Fact]]]  # its name, and the facts of each place in it


def places(names: Sequence[str], kinds: Sequence[Kind], draw: random.Random) -> list[list[Fact]]:
    """Draws facts about places; those of one file are of the same kinds, so that they are easily mistaken."""
    chosen = draw.sample(kinds, FACTS)
    return [[Fact(kind, name, draw.choice(kind.values)) for kind in draw.sample(chosen, FACTS)] for name in names]


def town(draw: random.Random) -> tuple[list[File], list[str], list[str]]:
    """The files of the town, and the places that it does not have."""
    english, chinese = draw.sample(PLACES, len(PLACES)), draw.sample(PLACES_CHINESE, len(PLACES_CHINESE))
    names = ["boats.csv", "bridges.md", "east.html", "gates.txt", "gardens.md", "hill.txt", "houses.md", "lamps.html"]
    names += ["library.md", "north.csv", "old_town.txt", "shops.md"]
    files = [(name, places([english.pop() for _ in range(3)], ENGLISH, draw)) for name in names]
    files += [(name, places([chinese.pop() for _ in range(3)], CHINESE, draw)) for name in ("码头.md", "老城.txt")]
    return files, english, chinese


def later(files: list[File], english: list[str], draw: random.Random) -> list[File]:
    """The same town some years later: two files are gone, one is new, and a third of the other facts have changed."""
    gone = {"hill.txt", "shops.md"}
    found = [
        (name, [[change(fact, draw) for fact in facts] for facts in there]) for name, there in files if name not in gone
    ]
    return sorted([*found, ("new_town.md", places([english.pop() for _ in range(3)], ENGLISH, draw))])


def change(fact: Fact, draw: random.Random) -> Fact:
    if draw.random() < 2 / 3:
        return fact
    return fact._replace(value=draw.choice([value for value in fact.kind.values if value != fact.value]))


# ---- files -----------------------------------------------------------------------------------------------------------


def text(name: str, there: list[list[Fact]]) -> str:
    """A file of some places: a section, a paragraph or a row for each."""
    sentences = [(facts[0].place.capitalize(), " ".join(fact.sentence for fact in facts)) for facts in there]
    title = Path(name).stem.replace("_", " ").capitalize()
    if name.endswith(".md"):
        body = "".join(f"\n## {place}\n\n{said}\n" for place, said in sentences)
        return f"---\ntitle: {title}\n---\n{body}"
    if name.endswith(".html"):
        body = "".join(f"<h2>{place}</h2>\n<p>{said}</p>\n" for place, said in sentences)
        head = f"<html><head><title>{title}</title></head><body>\n<nav>Home</nav>\n"
        return f"{head}{body}</body></html>\n"
    if name.endswith(".csv"):
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("name", "about"), *sentences])
        return table.getvalue()
    return "\n\n".join(said for _, said in sentences) + "\n"


def write(folder: Path, files: list[File]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, there in files:
        (folder / name).write_text(text(name, there), encoding="utf-8")


def asked(files: list[File], number: int = 0) -> list[dict[str, str]]:
    """A question about each fact."""
    return [
        {"question": fact.question(number), "answer": fact.sentence, "source": name}
        for name, there in files
        for facts in there
        for fact in facts
    ]


def told(files: list[File]) -> list[dict[str, str]]:
    """A question about all that is known of each place."""
    found = []
    for name, there in files:
        for facts in there:
            question = ABOUT[facts[0].kind in CHINESE].format(e=facts[0].place)
            found.append({"question": question, "answer": " ".join(fact.sentence for fact in facts), "source": name})
    return found


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lessons(english: list[str], chinese: list[str], draw: random.Random, size: int = 12) -> list[File]:
    """Files of all the other places."""
    found = []
    for names, kinds in ((english, ENGLISH), (chinese, CHINESE)):
        for number, start in enumerate(range(0, len(names), size)):
            suffix = (".md", ".html", ".txt", ".csv")[number % 4]
            found.append(
                (
                    f"{'town' if kinds is ENGLISH else '城'}_{number}{suffix}",
                    places(names[start : start + size], kinds, draw),
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lessons", default="", help="a folder for the lessons")
    folder = parser.parse_args().lessons
    draw = random.Random(0)
    files, english, chinese = town(draw)
    changed = later(files, english, draw)
    if folder:
        taught = lessons(english, chinese, draw)
        write(Path(folder) / "documents", taught)
        rows = [draw.choice(pair) for pair in zip(asked(taught), asked(taught, 1), strict=True)] + told(taught)
        draw.shuffle(rows)
        write_rows(Path(folder) / "questions.jsonl", rows)
        return
    write(HERE / "documents", files)
    write(HERE / "documents_changed", changed)
    write_rows(HERE / "questions.jsonl", asked(files))
    now, before = asked(changed), asked(files)
    known = {row["question"] for row in now}
    lost = [row | {"answer": UNKNOWN, "source": ""} for row in before if row["question"] not in known]
    write_rows(HERE / "questions_changed.jsonl", now + lost)
    write_rows(HERE / "study.jsonl", asked(files, 1))


if __name__ == "__main__":
    main()
