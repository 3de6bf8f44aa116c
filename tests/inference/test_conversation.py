"""A chat of ten turns with two pictures: each turn reads only what is new."""

import maverick_jax as mj
from maverick_jax.assets import digits
from oracle.compiling import no_compilation

TURNS = 10


def test_each_turn_reads_what_is_new_and_compiles_nothing():
    """From where the last answer ended; every picture goes through the vision tower once."""
    chat = mj.Chat(mj.load(), max_new_tokens=6)
    engine = chat._engine_for(1)
    engine.warm_up(extras=False, progress=False)
    pixels, _ = digits.held_out()
    known: list[int] = []
    read = 0
    with no_compilation():
        for turn in range(TURNS):
            chat("What is the sum?", images=[digits.picture(pixels[turn])] if turn in (0, 4) else [])
            answer = chat.last
            assert answer is not None
            ids = answer.request.ids.tolist()
            assert ids[: len(known)] == known
            assert answer.cached_tokens >= len(known) - 1
            read += len(ids) - answer.cached_tokens
            known = [*ids, *answer.tokens]
    assert read < len(known)
    assert engine._serving.runner.features.encoded == 2
    chat.stream("What is the sum?").close()  # nobody began to read it
    assert chat("What is the sum?")
