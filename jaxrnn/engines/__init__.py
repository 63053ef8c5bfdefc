"""Engines run a recurrence over time on a device; nothing else knows derivatives, kernels and platforms."""
