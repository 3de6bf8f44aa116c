"""How the embedded mini model was made: its definition, its training, and how well it does."""
