"""The one exception for what a user can cause and mend."""

LONGEST = 2000  # characters; the cure is at the end


class UserError(ValueError):
    """Something a user can mend: says what was found, where, what was expected and what to do.

    The command line prints it as one line and ends with status 2; as a `ValueError` it can be caught as usual.
    """

    def __init__(self, message: str):
        text = " ".join(message.splitlines())  # it may quote a library's message of several lines
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
        # It may quote a name from a stranger's file, which shall not move the cursor of a terminal.
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


def first_line(error: BaseException) -> str:
    """What a library's error says, without the pages that may follow."""
    return str(error).partition("\n")[0] or type(error).__name__
