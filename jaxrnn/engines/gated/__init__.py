"""The engine of gated recurrences: one product that reads the carry, then elementwise gates."""
