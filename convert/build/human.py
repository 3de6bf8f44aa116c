"""Numbers as people read them."""

from tqdm import tqdm


def human_bytes(count: float) -> str:
    """12,345,678 -> `12.3 MB`; powers of 1000, as disks are sold."""
    text = tqdm.format_sizeof(count, "B")
    return f"{text[:-2]} {text[-2:]}" if text[-2].isalpha() else f"{text[:-1]} B"
