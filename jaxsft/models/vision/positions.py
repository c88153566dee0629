"""Learned positions of another grid than they were learned on: bicubic interpolation, as torch's `interpolate` has it.

One matrix for rows and one for columns, made of the two sizes alone. Without antialiasing it is the cubic convolution
of Keys 1981 (doi 10.1109/TASSP.1981.1163711, eq. 15) with a = -0.75, edges repeated; with it a = -0.5, the filter as
wide as a step where the grid shrinks, and weights beyond the edge shared out among the others, as Pillow does.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The kernel of cubic convolution at distance x."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def matrix(old: int, new: int, *, antialias: bool = False) -> Float[np.ndarray, "new old"]:
    """What `new` points take of `old` ones along an axis; each row sums to 1.

    Example:
      >>> matrix(2, 4)[1].round(4).tolist()
      [0.7734, 0.2266]
      >>> matrix(4, 2, antialias=True).round(4).tolist()
      [[0.4587, 0.4587, 0.1198, -0.0372], [-0.0372, 0.1198, 0.4587, 0.4587]]
    """
    step, out = old / new, np.zeros((new, old))
    for i in range(new):
        if antialias:
            wide, centre = max(step, 1.0), step * (i + 0.5)
            first, last = max(int(centre - 2 * wide + 0.5), 0), min(int(centre + 2 * wide + 0.5), old)
            weights = cubic((np.arange(first, last) - centre + 0.5) / wide, -0.5)
            out[i, first:last] = weights / weights.sum()
        else:
            at = step * (i + 0.5) - 0.5
            for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                out[i, min(max(j, 0), old - 1)] += cubic(np.array(at - j), -0.75)
    return out


def resample(
    table: Float[Array, "T D"], grid: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> Float[Array, "U D"]:
    """Positions of a grid, row by row, at the points of a new grid; float32 as the rows of a table are.

    Example:
      >>> resample(jnp.ones((4, 3)), (2, 2), (3, 5)).shape
      (15, 3)
    """
    if grid == new:
        return table
    rows, columns = (
        jnp.asarray(matrix(n, m, antialias=antialias), jnp.float32) for n, m in zip(grid, new, strict=True)
    )
    exact = jax.lax.Precision.HIGHEST
    full = table.astype(jnp.float32).reshape(*grid, -1)
    full = jnp.einsum("ih,jw,hwd->ijd", rows, columns, full, precision=exact)
    return full.reshape(-1, full.shape[-1])
