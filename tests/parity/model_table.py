"""Writes the table of docs/models.md: the registry, and the error of each family beside transformers, measured.

    python -m tests.parity.model_table

Every configuration of `pairs.CASES` and `pairs.ENCODERS` is made in torch with random weights, saved, loaded here, and
reads 4 rows of 160 tokens; a family's error is the largest difference of any logit, in float32.
"""

import inspect
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: python -m tests.parity.model_table -->\n", "<!-- end -->\n"


def lines() -> dict[str, str]:
    """What the registry says of each family, as the first cells of a row of the table."""
    from jaxsft.models import FAMILIES

    found = {}
    for name, family in FAMILIES.items():
        said = (inspect.getmodule(family.read_config).__doc__ or "").split("\n\nSource")[0]  # type: ignore[union-attr]
        about = " ".join(said.split("\n\n")[0].split())
        known = ", ".join(f"`{one}`" for one in family.checkpoints)
        scores = "yes" if family.classifier else "no"
        found[name] = f"| `{name}` | {about} | {known} | {scores} |"
    return found


def table(errors: Mapping[str, tuple[float, int]]) -> str:
    """The table; errors: name -> (largest error, configurations)."""
    head = "| `model_type` | what it is | checkpoints of this kind | reward model | largest error |\n"
    head += "|---|---|---|---|---|\n"
    rows = [f"{line} {errors[name][0]:.1e} of {errors[name][1]} |\n" for name, line in lines().items()]
    return head + "".join(rows)


def measured(page: str) -> dict[str, tuple[float, int]]:
    """The errors that a page tells."""
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


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(measure()) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
