"""Tools that a model may call: which of them, how it is made to, and what it wrote as calls."""
