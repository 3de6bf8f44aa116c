"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """Something a user can mend: says what was found, where, what was expected and what to do.

    The command line prints it as one line and ends with status 2; as a `ValueError` it can be caught as usual.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())  # it may quote a library's message of several lines, or a stranger's file
        super().__init__("".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in line))
