"""The axes of a mesh, from the outermost, whose devices exchange least, to the innermost, whose devices sit closest."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

DATA = "data"  # copies of the model
FSDP = "fsdp"  # slices of every weight, gathered when a layer needs them
EXPERT = "expert"  # experts of a mixture
CONTEXT = "context"  # pieces of every row
TENSOR = "tensor"  # heads, hidden units and tokens of the vocabulary
ALL = (DATA, FSDP, EXPERT, CONTEXT, TENSOR)
ROWS = (DATA, FSDP, EXPERT)  # those that share out the rows of a batch


def rows(mesh: "Mesh | None") -> int:
    """Into how many parts the rows of a batch are shared out.

    Example:
      >>> rows(None)
      1
    """
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)
