"""Cells as modules of Flax, and its cells as cells."""
