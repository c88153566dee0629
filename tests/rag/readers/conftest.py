"""Files of every kind, made for a test."""

from pathlib import Path

import pytest

from jaxsft.rag import readers
from jaxsft.rag.records import Document


@pytest.fixture
def read(tmp_path):
    """Writes a file and reads its documents."""

    def read(name: str, data: str | bytes, **how) -> list[Document]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
        return list(readers.read(tmp_path, file, **how))

    return read


def sections(document: Document) -> list[tuple[str, str]]:
    """(heading, text) of each section."""
    return [(section.heading, document.text[section.start : section.end].strip()) for section in document.sections]


def pdf(*pages: str) -> bytes:
    """The smallest PDF with these lines of Latin text, one or more a page."""
    bodies = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for page in pages:
        lines = "".join(f"({line}) Tj 0 -20 Td " for line in page.splitlines())
        stream = f"BT /F1 12 Tf 50 700 Td {lines}ET" if page else ""
        bodies.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        font = "<< /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >>"
        resources = f"/Resources << /Font {font} >> /MediaBox [0 0 595 842]"
        bodies.append(f"<< /Type /Page /Parent 2 0 R {resources} /Contents {len(bodies)} 0 R >>")
        kids.append(f"{len(bodies)} 0 R")
    bodies[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    found, places = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(found))
        found += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(bodies) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    return found + f"{end}startxref\n{len(found)}\n%%EOF\n".encode()


def sample(folder: Path) -> dict[str, Path]:
    """A small file of each kind, in which a lamp is red."""
    import docx

    written = docx.Document()
    written.add_paragraph("The lamp is red.")
    written.save(str(folder / "a.docx"))
    page = "<html><body><p>The lamp is red.</p></body></html>"
    texts = {
        ".txt": "The lamp is red.",
        ".md": "# A\n\nThe lamp is red.",
        ".markdown": "The lamp is red.",
        ".html": page,
    }
    texts |= {".htm": page, ".csv": "text\nThe lamp is red.\n", ".json": '{"text": "The lamp is red."}'}
    texts |= {".jsonl": '{"text": "The lamp is red."}\n'}
    for suffix, text in texts.items():
        (folder / f"a{suffix}").write_text(text, encoding="utf-8")
    (folder / "a.pdf").write_bytes(pdf("The lamp is red."))
    return {file.suffix: file for file in sorted(folder.iterdir())}
