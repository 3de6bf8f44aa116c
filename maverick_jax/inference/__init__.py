"""From prompts to tokens: cache, sampling, generation, chat."""
