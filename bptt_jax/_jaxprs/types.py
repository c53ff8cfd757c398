"""Names for JAX's objects in annotations. To mypy each is `Any`, because JAX's own types are private or too wide.

Leaf     an array, a tracer, or the type of one: it has a shape and a dtype
Index    an integer, or a tracer of one
Tree     a pytree of leaves
Device   a device, of this machine or of a topology, or None
Var      a variable of a jaxpr;   Atom   a variable or a literal
Eqn      an equation of a jaxpr;  Effect  one of its effects
Jaxpr    an open jaxpr;           ClosedJaxpr   one with its constants
"""

from typing import Any, TypeAlias

Leaf: TypeAlias = Any
Index: TypeAlias = Any
Tree: TypeAlias = Any
Device: TypeAlias = Any
Var: TypeAlias = Any
Atom: TypeAlias = Any
Eqn: TypeAlias = Any
Effect: TypeAlias = Any
Jaxpr: TypeAlias = Any
ClosedJaxpr: TypeAlias = Any
