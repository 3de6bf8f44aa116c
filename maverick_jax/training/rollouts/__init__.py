"""A model's own answers: prompts, what answers are worth, how they are drawn, and which of them teach something."""
