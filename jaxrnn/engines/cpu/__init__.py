"""The compiled kernels, and the library that holds them."""
