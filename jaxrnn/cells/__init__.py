"""One file per recurrence: its equations, parameters and initialisers."""
