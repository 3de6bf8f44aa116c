"""A student learns what a teacher says of every token: of answers in a file, or of its own."""
