"""Who computes what next, and where it is kept: plans of plain data, made without JAX and replayed without a model."""
