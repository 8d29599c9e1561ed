"""The legend of dimension letters, and the array types that every signature uses.

    B  batch                     H  head dimension of queries and keys (d_k)
    T  queries                   V  head dimension of values (d_v)
    S  keys                      C  compressed blocks
    N  query heads               M  selected blocks a query (n)
    K  key/value heads           D  model dimension
    G  query heads a group, N // K

Arrays are laid out batch, position, head, feature (BTNH). `jaxtyping` writes the letters into the
types: `Float[Array, "B T N H"]` is a floating-point array of four dimensions.
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int", "KeyValue"]


class KeyValue(NamedTuple):
    """The keys and values that one branch attends; any pair `(k, v)` serves as well."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
