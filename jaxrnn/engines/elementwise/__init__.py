"""The engine of linear recurrences of single units, with their gates."""
