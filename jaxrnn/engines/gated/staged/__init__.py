"""Gated recurrences with options by one kernel."""
