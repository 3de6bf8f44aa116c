"""What lies in a file's place when it was not really fetched: a pointer of git-lfs, a server's page, nothing."""

from __future__ import annotations

import re
import string

ENOUGH = 512  # bytes from the beginning, to tell
LFS = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
KINDS = {  # how other files begin
    b"GGUF": "a GGUF file (llama.cpp), which is not read: use the safetensors or .pth checkpoint",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\xfd7zXZ": "an xz archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"%PDF": "a PDF: fetch the file itself",
}
SHOWN = 60  # characters of a server's words
TEXT = frozenset(string.printable.encode())


def explain(begin: bytes) -> str | None:
    """What is in the place of a file, and what to do, by the first `ENOUGH` bytes; None if it may be the file itself.

    Returns:
      The end of a sentence that begins with the file's name.
    """
    if not begin:
        return "is empty, for a download did not begin or a disk was full: fetch it again."
    if begin.startswith(LFS):
        return "is a pointer of git-lfs, and not the file itself: run `git lfs pull` in its directory."
    if PAGE.match(begin):
        return "is a page of HTML, as a server sends where a login is missing: fetch it again, logged in (`hf auth login`)."
    kind = next((kind for start, kind in KINDS.items() if begin.startswith(start)), None)
    return f"is {kind}." if kind else None


def explain_text(begin: bytes) -> str | None:
    """As `explain`, for a file that holds no text: any text in it is what a server had to say."""
    if (known := explain(begin)) is not None:
        return known
    if TEXT.issuperset(begin):
        said = " ".join(begin[: SHOWN + 1].decode("ascii").split())[:SHOWN]
        return f"is text, a server's answer in the place of the file ({said!r}…): fetch it again."
    return None
