"""How prompts are cut and padded: to few sizes, so that few programs are compiled."""

PIECE = 8192  # tokens of a prefill call, all rows together: bounds what a layer computes at once
PIECES = (32, 128, 512, 2048, 8192)  # each four times as long as the one before


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pieces(longest: int) -> tuple[int, ...]:
    """Tokens of one row in a prefill call, where no piece is longer than this."""
    return tuple(size for size in PIECES if size == PIECES[0] or size // 4 < longest)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ..., the last of which is at least `most`."""
    return tuple(1 << i for i in range(next_power_of_two(most).bit_length()))


def call_rows(slots: int) -> tuple[int, ...]:
    """Rows of a call: 1, 4, 16, ..., and all of them."""
    return (*(1 << i for i in range(0, slots.bit_length(), 2) if 1 << i < slots), slots)


def decode_rows(slots: int, platform: str) -> tuple[int, ...]:
    """Rows of a decode call. A single one has one beside it on a GPU, that is none: for vectors XLA launches a quarter more."""
    least = 2 if platform in ("gpu", "cuda") else 1
    return tuple(sorted({max(rows, least) for rows in call_rows(slots)}))


def round_up_context(tokens: int) -> int:
    """Cache length: at most an eighth more than asked for, from a list that grows with the logarithm."""
    step = max(64, next_power_of_two(tokens) // 16)
    return -(-tokens // step) * step
