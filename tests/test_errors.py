"""The line that a user reads."""

from maverick_jax.errors import UserError


def test_a_message_is_one_line_that_moves_no_cursor():
    """It may quote a library, a file's name or a tensor's, and whoever wrote these may have meant to clear the screen."""
    assert str(UserError("first\nsecond\r\nthird")) == "first second third"
    assert str(UserError("a\x1b[2Jb\x07c\u202ed\ud800e")) == r"a\x1b[2Jb\x07c\u202ed\ud800e"
    assert str(UserError("слой 🦙")) == "слой 🦙"
