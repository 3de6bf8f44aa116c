"""How prompts are cut and padded: to few sizes, so that few programs are compiled."""

PIECE = 8192  # tokens of a prefill piece, all rows together: bounds what a layer computes at once
SHORTEST_PIECE = 32


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def longest_piece(rows: int) -> int:
    """Tokens that each of so many rows reads at once in a prefill."""
    return max(SHORTEST_PIECE, PIECE // next_power_of_two(rows))


def piece_size(tokens: int) -> int:
    """Padded length of a prefill piece: a power of two."""
    return max(SHORTEST_PIECE, next_power_of_two(tokens))


def round_up_context(tokens: int) -> int:
    """Cache length: at most an eighth more than asked for, from a list that grows with the logarithm."""
    step = max(64, next_power_of_two(tokens) // 16)
    return -(-tokens // step) * step
