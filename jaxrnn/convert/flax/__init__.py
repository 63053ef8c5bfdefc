"""Models from and to Flax."""

from jaxrnn.convert.flax.models import from_flax, to_flax

__all__ = ["from_flax", "to_flax"]
