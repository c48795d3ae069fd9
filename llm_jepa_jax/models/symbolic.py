# SPDX-License-Identifier: Apache-2.0
"""What `symbolic_zeros` tells a function with a derivative of its own: which inputs anybody differentiates by."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


def known(primals: Any) -> tuple[Any, bool]:
    """The values of a forward rule's argument, and whether any leaf of it is differentiated by."""
    leaves, structure = jax.tree.flatten(primals, is_leaf=_is_primal)
    values = jax.tree.unflatten(structure, [leaf.value for leaf in leaves])
    return values, any(leaf.perturbed for leaf in leaves)


def filled(cotangent: Any) -> jax.Array:
    """A backward rule's argument as an array, zeros where it is known to be zero."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


def _is_primal(node: Any) -> bool:
    return isinstance(node, CustomVJPPrimal)
