"""Writes the tables of docs/models.md: the registries, and the error of each family beside transformers, measured.

    python -m tests.parity.model_table

Every configuration of `pairs.CASES` and `pairs.ENCODERS` is made in torch with random weights, saved, loaded here, and
reads 4 rows of 160 tokens; a family's error is the largest difference of any logit, in float32. Those of
`images.CASES` see 3 images of their own size and of another; the error is that of any hidden state or score.
"""

import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m tests.parity.model_table -->\n", "<!-- end -->\n"
IMAGES = "<!-- begin: python -m tests.parity.model_table, images -->\n"


def lines(registry: Mapping, last: Callable[[str], str]) -> dict[str, str]:
    """What a registry says of each family, as the first cells of a row of a table; `last` of `Family.classifier`."""
    found = {}
    for name, family in registry.items():
        said = (inspect.getmodule(family.read_config).__doc__ or "").split("\n\nSource")[0]  # type: ignore[union-attr]
        about = " ".join(said.split("\n\n")[0].split())
        known = ", ".join(f"`{one}`" for one in family.checkpoints)
        found[name] = f"| `{name}` | {about} | {known} | {last(family.classifier)} |"
    return found


def table(errors: Mapping[str, tuple[float, int]]) -> str:
    """The table of texts; errors: name -> (largest error, configurations)."""
    from jaxsft.models import FAMILIES

    return _table("reward model", lines(FAMILIES, lambda classifier: "yes" if classifier else "no"), errors)


def image_table(errors: Mapping[str, tuple[float, int]]) -> str:
    """The table of images."""
    from jaxsft.models import VISION

    return _table("leaves as", lines(VISION, lambda classifier: f"`{classifier}`"), errors)


def _table(last: str, rows: Mapping[str, str], errors: Mapping[str, tuple[float, int]]) -> str:
    head = f"| `model_type` | what it is | checkpoints of this kind | {last} | largest error |\n"
    head += "|---|---|---|---|---|\n"
    return head + "".join(f"{line} {errors[name][0]:.1e} of {errors[name][1]} |\n" for name, line in rows.items())


def measured(page: str, begin: str = BEGIN) -> dict[str, tuple[float, int]]:
    """The errors that a page tells in the table that begins there."""
    page = page.partition(begin)[2].partition(END)[0]
    found = re.findall(r"^\| `(\w+)` \|.*\| ([\d.e+-]+) of (\d+) \|$", page, re.MULTILINE)
    return {name: (float(error), int(count)) for name, error, count in found}


def measure() -> dict[str, tuple[float, int]]:
    import numpy as np

    from jaxsft import models

    from . import pairs

    found: dict[str, tuple[float, int]] = {}
    heads = [case for case, (kind, _) in pairs.ENCODERS.items() if kind.endswith("ForMaskedLM")]
    for case in [*pairs.CASES, *heads]:
        with tempfile.TemporaryDirectory() as folder:
            pair = pairs.make(case, Path(folder))
        name = next(name for name, family in models.FAMILIES.items() if family is pair.family)
        tokens = np.stack(pairs.documents([160] * 4))
        if name == "roberta":  # its positions count what is no padding token, and these rows have no padding
            padding = pair.theirs.config.pad_token_id
            tokens = np.where(tokens == padding, padding + 1, tokens)
        ours = pairs.ours(pair.model, {"params": pair.params}, tokens)
        error = float(np.abs(np.asarray(ours) - pairs.theirs(pair.theirs, tokens)).max())
        worst, count = found.get(name, (0.0, 0))
        found[name] = (max(worst, error), count + 1)
        print(f"{error:.1e}  {case}", flush=True)
    return found


def measure_images() -> dict[str, tuple[float, int]]:
    import json

    import numpy as np

    from . import images

    found: dict[str, tuple[float, int]] = {}
    for case in images.CASES:
        with tempfile.TemporaryDirectory() as folder:
            pair = images.make(case, Path(folder))
            name = json.loads((Path(folder) / "config.json").read_text())["model_type"]
        own = pair.model.config.image_size if pair.model.config.layers else 32
        error, variables = 0.0, {"params": pair.params}
        for size in ((own, own), (42, 70)):
            seen = images.pixels(*size)
            pairs = [(images.hidden(pair.model, variables, seen), images.their_hidden(pair.theirs, seen))]
            if case in images.HEADED:
                pairs.append((images.ours(pair.model, variables, seen), images.theirs(pair.theirs, seen)))
            error = max(error, *(float(np.abs(left - right).max()) for left, right in pairs))
        worst, count = found.get(name, (0.0, 0))
        found[name] = (max(worst, error), count + 1)
        print(f"{error:.1e}  {case}", flush=True)
    return found


def main() -> None:
    """`images`: that table alone."""
    page = PAGE.read_text(encoding="utf-8")
    made = {} if sys.argv[1:] == ["images"] else {BEGIN: table(measure())}
    for begin, rows in (made | {IMAGES: image_table(measure_images())}).items():
        before, _, rest = page.partition(begin)
        page = before + begin + rows + END + rest.partition(END)[2]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
