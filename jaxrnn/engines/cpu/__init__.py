"""The compiled kernels, and the library that they are."""
