"""Pure functions of arrays: the mathematics of Native Sparse Attention. No Flax in this room."""
