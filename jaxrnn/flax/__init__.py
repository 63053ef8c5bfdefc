"""Cells as Flax modules, and Flax cells as cells."""
