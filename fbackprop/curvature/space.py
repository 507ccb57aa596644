"""The space that an operator acts on: pytrees of one structure, and their flattened form."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Space(NamedTuple):
    """Pytrees like the parameters; hashable, so that it can be static.

    Attributes:
      structure: of the tree.
      shapes, dtypes: of its leaves.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    @staticmethod
    def of(tree) -> Space:
        leaves, structure = jax.tree.flatten(tree)
        return Space(
            structure,
            tuple(jnp.shape(x) for x in leaves),
            tuple(np.dtype(getattr(x, "dtype", jnp.result_type(x))) for x in leaves),
        )

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """P, how many numbers a tree has."""
        return sum(self.sizes)

    @property
    def dtype(self):
        """That of the flattened tree."""
        return functools.reduce(jnp.promote_types, self.dtypes, jnp.dtype(jnp.float32))

    def like(self):
        """The types of a tree's leaves."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return self.structure.unflatten([jax.ShapeDtypeStruct(s, d) for s, d in pairs])

    def ravel(self, tree) -> jax.Array:
        """The tree as one vector, (P,)."""
        leaves = [jnp.ravel(x).astype(self.dtype) for x in self.check(tree)]
        return jnp.concatenate(leaves) if leaves else jnp.zeros(0, self.dtype)

    def unravel(self, vector) -> Any:
        """A vector (P,) as a tree."""
        pieces = jnp.split(vector, np.cumsum(self.sizes)[:-1]) if self.sizes else []
        triples = zip(pieces, self.shapes, self.dtypes, strict=True)
        return self.structure.unflatten([x.reshape(s).astype(d) for x, s, d in triples])

    def cast(self, tree) -> Any:
        """The tree in the dtypes of the space."""
        pairs = zip(self.check(tree), self.dtypes, strict=True)
        return self.structure.unflatten([jnp.asarray(x, dtype) for x, dtype in pairs])

    def wide(self, tree) -> Any:
        """The tree in one precision, that of the flattened tree; integers too."""
        return self.structure.unflatten([jnp.asarray(x, self.dtype) for x in self.check(tree)])

    def check(self, tree) -> list:
        """The leaves of a tree.

        Raises:
          ValueError: if it has another structure or other shapes.
        """
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.structure:
            raise ValueError(
                f"the operator is for trees of structure {self.structure}, but was given "
                f"{structure}: pass a tree like the parameters"
            )
        shapes = tuple(jnp.shape(x) for x in leaves)
        if shapes != self.shapes:
            raise ValueError(
                f"the operator is for leaves of shapes {list(self.shapes)}, but was given "
                f"{list(shapes)}: pass a tree like the parameters"
            )
        return leaves
