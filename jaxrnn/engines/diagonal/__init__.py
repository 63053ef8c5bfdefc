"""The engine of diagonal recurrences that are read by a sum over their states."""
