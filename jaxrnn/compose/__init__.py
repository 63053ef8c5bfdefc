"""Cells made of other cells."""
