"""A page of the mistakes that a classifier is surest of: often what is wrong is the label, or the picture.

One file that needs no other: the pictures are small JPEGs inside it.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 160  # pixels of a small picture
MOST = 60  # pictures on a page

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 sans-serif; margin: 2em; }}
figure {{ display: inline-block; width: 200px; margin: 0 1em 1.5em 0; vertical-align: top; }}
figcaption {{ overflow-wrap: anywhere; }}
img {{ max-width: 160px; max-height: 160px; }}
.path {{ color: #666; font-size: 12px; }}
</style></head><body>
<h1>{title}</h1>
<p>{lead}</p>
{figures}
</body></html>
"""


def write(rows: Sequence[dict[str, Any]], picture: Callable[[int], "Image"], file: Path) -> int:
    """Writes the page.

    Args:
      rows: records of `classes.said`, with labels.
      picture: the number of a row -> what it shows.
      file: to write.

    Returns:
      how many mistakes there are, of which the surest `MOST` are shown.
    """
    wrong = [number for number, row in enumerate(rows) if row["prediction"] != row["label"]]
    surest = sorted(wrong, key=lambda number: -rows[number]["probability"])[:MOST]
    lead = f"{len(wrong):,} of {len(rows):,} held-out images are taken for another class"
    lead += "." if len(surest) == len(wrong) else f"; the {len(surest)} of which the model is surest are here."
    figures = "\n".join(_figure(rows[number], picture(number)) for number in surest)
    file.write_text(PAGE.format(title="The surest mistakes", lead=lead, figures=figures), encoding="utf-8")
    return len(wrong)


def _figure(row: dict[str, Any], picture: "Image") -> str:
    words = {name: html.escape(str(row[name])) for name in ("image", "label", "prediction")}
    return (
        f'<figure><img alt="{words["label"]}" src="data:image/jpeg;base64,{_small(picture)}">'
        f"<figcaption>called <b>{words['prediction']}</b>, {row['probability']:.1%}<br>labelled <b>{words['label']}</b>"
        f'<br><span class="path">{words["image"]}</span></figcaption></figure>'
    )


def _small(picture: "Image") -> str:
    """A picture of at most `SIDE` pixels a side as base64 of a JPEG; one that is smaller is made larger."""
    scale = SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    stream = io.BytesIO()
    picture.resize(size).save(stream, "JPEG", quality=80)
    return base64.b64encode(stream.getvalue()).decode()
