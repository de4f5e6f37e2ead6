"""Cross-scan and cross-merge of VMamba (Liu et al. 2024, arXiv 2401.10166, section 4.2): an image as four sequences,
and back.

Direction 0 reads a map row by row, 1 column by column, 2 is the reverse of 0 and 3 the reverse of 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.ops import checks

DIRECTIONS = 4


def cross_scan(x: Float[Array, "B H W C"]) -> Float[Array, "4 B T C"]:
    """Returns the four walks over each map, T = H * W steps each.

    Raises:
      ValueError: when x is no batch of maps.
    """
    sizes = checks.shapes("cross_scan", x=(x, "B H W C"))
    columns = jnp.swapaxes(x, 1, 2)
    ahead = jnp.stack([m.reshape(sizes["B"], -1, sizes["C"]) for m in (x, columns)])
    return jnp.concatenate([ahead, ahead[:, :, ::-1]])


def cross_merge(y: Float[Array, "4 B T C"], height: int, width: int) -> Float[Array, "B H W C"]:
    """Puts every step of the four walks back to its place on the map and adds them up: the transpose of `cross_scan`.

    Args:
      y: the four sequences, in the order of `cross_scan`.
      height: H of the map.
      width: W of the map; T is H * W.

    Raises:
      ValueError: when y is not four sequences of H * W steps.
    """
    sizes = checks.shapes("cross_merge", y=(y, f"{DIRECTIONS} B {height * width} C"))
    rows, columns = y[:2] + y[2:, :, ::-1]
    batch, channels = sizes["B"], sizes["C"]
    return rows.reshape(batch, height, width, channels) + jnp.swapaxes(
        columns.reshape(batch, width, height, channels), 1, 2
    )
