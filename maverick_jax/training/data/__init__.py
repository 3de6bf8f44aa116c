"""From files of conversations to batches: read, made into tokens, packed into rows, shuffled."""
