"""Engines run a recurrence over time on a device: the only place that knows derivatives, kernels and platforms."""
