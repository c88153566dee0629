"""Each format against what stands in the file."""

import csv
import io
import json
import re

import pytest

from jaxsft.rag.readers import ReadError

from .conftest import pdf, sections

# ---- markdown --------------------------------------------------------------------------------------------------------

MANUAL = """---
title: The handbook
keeper: Wren
lamps: [red, green]
opened: 1871-05-03
---
Before all headings.

# Manual

## Lamps and *oil*

Red.

```
# no heading
```

- # in a list

Care
----

Daily.

# Stores
"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_markdown_has_a_section_for_each_heading_and_front_matter_as_tags(read, line_end):
    [document] = read("a.md", MANUAL.replace("\n", line_end))
    assert document.text == MANUAL.replace("\n", line_end)
    assert document.title == "The handbook"
    assert document.tags == {"title": "The handbook", "keeper": "Wren", "lamps": "red, green", "opened": "1871-05-03"}
    found = [(heading, text.replace(line_end, "\n")) for heading, text in sections(document)]
    assert found == [
        ("", "Before all headings."),
        ("Manual", "# Manual"),
        ("Manual > Lamps and oil", "## Lamps and *oil*\n\nRed.\n\n```\n# no heading\n```\n\n- # in a list"),
        ("Manual > Care", "Care\n----\n\nDaily."),
        ("Stores", "# Stores"),
    ]


def test_markdown_without_front_matter_is_called_after_its_first_heading(read):
    [document] = read("a.md", "# Lamps\n\n## Oil\n\nx")
    assert (document.title, document.tags) == ("Lamps", {})
    [document] = read("b.md", "no heading")
    assert document.title == "b"


@pytest.mark.parametrize("front", ["---\nno mapping\n---\n", "---\na: [\n---\n", "---\nd: 2024-99-99\n---\n", "---\n"])
def test_what_only_looks_like_front_matter_is_text(read, front):
    [document] = read("a.md", front + "x")
    assert document.tags == {}
    assert document.sections[0].start == 0


# ---- html ------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html><html><head><title> The
 harbour </title><style>p {}</style></head><body><nav>Home</nav><!-- hidden -->
<h1>Harbour</h1><p>The <b>red</b>\n  lamp&nbsp;is&#32;lit.<br>At dusk.</p>
<div>Outer <div>inner</div> tail</div>
<h2>Prices</h2><table><tr><th>what</th><th>pence</th></tr><tr><td>boat</td><td>4</td></tr></table>
<ul><li>one<li>two</ul><pre>a  b
 c</pre><script>var x = "<p>no</p>";</script></body></html>"""


def test_html_is_what_a_reader_sees(read):
    [document] = read("a.html", PAGE)
    assert document.title == "The harbour"
    [(first, text), (second, prices)] = sections(document)
    assert (first, second) == ("Harbour", "Harbour > Prices")
    assert text == "Harbour\n\nThe red lamp\xa0is lit.\nAt dusk.\n\nOuter\n\ninner\n\ntail"
    assert prices == "Prices\n\nwhat | pence\n\nboat | 4\n\none\n\ntwo\n\na  b\n c"


def test_html_says_its_encoding_and_may_be_wrong_about_it(read):
    page = '<meta charset="{}"><p>灯塔 красный маяк</p>'
    for said, used in [("gb18030", "gb18030"), ("utf-8", "utf-8"), ("us-ascii", "utf-8"), ("nonsense", "utf-8")]:
        [document] = read("a.html", page.format(said).encode(used))
        assert document.text == "灯塔 красный маяк"


def test_html_may_be_broken_and_deep(read):
    [document] = read("a.html", "<p>open <b>bold<p>next" + "<div>" * 3000 + "deep</p></b>")
    assert document.text.split() == ["open", "bold", "next", "deep"]


# ---- pdf -------------------------------------------------------------------------------------------------------------


def locked(data: bytes, **passwords) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.add_metadata({"/Title": "The lamp"})
    if passwords:
        writer.encrypt(**passwords, algorithm="AES-256")
    found = io.BytesIO()
    writer.write(found)
    return found.getvalue()


def test_pdf_has_a_section_for_each_page_with_text(read):
    [document] = read("a.pdf", pdf("The lamp is red.\nIt is lit.", "", "Third."))
    assert [(s.page, document.text[s.start : s.end].split()) for s in document.sections] == [
        (1, "The lamp is red. It is lit.".split()),
        (3, ["Third."]),
    ]
    assert document.title == "a"


def test_pdf_is_called_as_it_says(read):
    assert read("a.pdf", locked(pdf("x")))[0].title == "The lamp"


def test_pdf_with_a_password_for_changes_alone_opens(read):
    [document] = read("a.pdf", locked(pdf("The lamp is red."), user_password="", owner_password="wren"))
    assert document.text.strip() == "The lamp is red."


def test_pdf_with_a_password_is_refused(read):
    with pytest.raises(ReadError, match="is encrypted with a password; save a copy without one"):
        read("a.pdf", locked(pdf("x"), user_password="wren"))


def test_pdf_without_text_is_told_to_be_a_scan(read):
    with pytest.raises(ReadError, match=r"no text on its 2 pages.*\(a scan\); recognise its text first"):
        read("a.pdf", pdf("", ""))


# ---- docx ------------------------------------------------------------------------------------------------------------


def written(fill) -> bytes:
    import docx

    document = docx.Document()
    fill(document)
    found = io.BytesIO()
    document.save(found)
    return found.getvalue()


def test_docx_has_headings_and_tables_in_their_places(read):
    def fill(document):
        document.core_properties.title = "The lamp"
        document.add_heading("Lamps", 1)
        document.add_paragraph("Before the table.")
        table = document.add_table(2, 3)
        for i, cell in enumerate(cell for row in table.rows for cell in row.cells):
            cell.text = f"cell {i}"
        table.cell(1, 0).merge(table.cell(1, 1)).text = "wide"
        document.add_heading("Oil", 2)
        document.add_paragraph("Whale.")

    [document] = read("a.docx", written(fill))
    assert document.title == "The lamp"
    assert sections(document) == [
        ("Lamps", "Lamps\n\nBefore the table.\n\ncell 0 | cell 1 | cell 2\nwide | cell 5"),
        ("Lamps > Oil", "Oil\n\nWhale."),
    ]


def test_docx_that_unpacks_to_more_than_the_limit_is_refused(read):
    data = written(lambda document: document.add_paragraph("x" * 300_000))
    assert len(data) < 100_000
    with pytest.raises(ReadError, match=r"bytes when unpacked, and the limit is 100,000"):
        read("a.docx", data, max_bytes=100_000)


def test_an_older_word_document_is_told_so(read):
    with pytest.raises(ReadError, match=r"is no Word document: an older \.doc, one with a password, or broken"):
        read("a.docx", bytes.fromhex("d0cf11e0a1b11ae1") + b"\0" * 600)


# ---- tables ----------------------------------------------------------------------------------------------------------

ROWS = [
    {
        "name": "boat",
        "text": 'A "red" boat, with\nsails; and more of the same, so that it is no tag at all',
        "pence": "4",
    },
    {"name": "灯塔", "text": "", "pence": "7"},
]


@pytest.mark.parametrize("part", [",", ";", "\t", "|"])
def test_csv_has_a_document_for_each_row(read, part):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ROWS[0], delimiter=part)
    writer.writeheader()
    writer.writerows(ROWS)
    boat, tower = read("notes.csv", stream.getvalue())
    assert (boat.source, tower.source) == ("notes.csv#1", "notes.csv#2")
    assert boat.text == f"name: boat\ntext: {ROWS[0]['text']}\npence: 4"
    assert tower.text == "name: 灯塔\npence: 7"
    assert (boat.title, boat.tags) == ("boat", {"name": "boat", "pence": "4"})


def test_json_and_json_lines_say_the_same(read):
    rows = [{"title": "Lamp", "size": {"high": 3, "lit": True}, "of": ["oil", "glass"], "none": None}, {"text": "x"}]
    listed = read("a.json", json.dumps(rows))
    lines = read("a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert [one._replace(source="") for one in listed] == [one._replace(source="") for one in lines]
    assert [one.source for one in listed] == ["a.json#1", "a.json#2"]
    assert listed[0].text == "title: Lamp\nsize.high: 3\nsize.lit: true\nof: oil, glass"
    assert listed[1].text == "x"
    assert [one.source for one in read("b.json", json.dumps(rows[0]))] == ["b.json"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 values, the header 2; quote"),
        ("a.csv", 'a,b\n1,"2\n', "line 2: unexpected end of data; repair it"),
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3, column 7: not valid JSON (Expecting value)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: [1] is no row"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "line 2, column 7: not valid JSON (Expecting ':' delimiter); repair it"),
        ("a.json", '[{"a": 1}, 2]', 'row 2 is 2; a document is an object with named values; write {"text": "..."}'),
        ("a.json", "[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_row_is_told_by_its_place(read, tmp_path, name, text, says):
    with pytest.raises(ReadError, match=re.escape(f"{tmp_path / name}: {says}")):
        read(name, text)


def test_rows_before_a_broken_one_come_first(tmp_path):
    from jaxsft.rag import readers

    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "one"}\n{', encoding="utf-8")
    found = readers.read(tmp_path, file)
    assert next(found).text == "one"
    with pytest.raises(ReadError):
        next(found)


def test_halves_of_surrogate_pairs_reach_no_text(read):
    [document] = read("a.json", r'{"text": "\ud83d\ude42 \ud83d"}')
    assert document.text == "🙂 \ufffd"
    with pytest.raises(ReadError, match="half of a surrogate pair"):
        read("a.jsonl", r'{"text": "\ud83d"}')
