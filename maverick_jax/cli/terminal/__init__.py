"""A conversation at a terminal: what it is told, and what is typed there."""
