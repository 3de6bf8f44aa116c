"""A conversation: what was said stays said, pictures stay what they were, and no text is lost on the way out.

The model is a stand-in that says what it is told to: what is tested is what it is given and what becomes of its words.
"""

import numpy as np
import pytest
from PIL import Image

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.errors import UserError
from maverick_jax.inference import chat as chat_module
from maverick_jax.inference.chat import Chat
from maverick_jax.prompt import Tokenizer, render, tile_image
from maverick_jax.training.mini.definition import mini_config, mini_tokenizer

TOKENIZER = Tokenizer(mini_tokenizer())
CONFIG = mini_config(mini_tokenizer())
RED = Image.new("RGB", (60, 32), "red")


class Scripted:
    """Stands for `Generation`: notes the prompts, and says the next answer a few tokens at a time."""

    answers: list[str]
    seen: list[tuple[list[int], np.ndarray | None]]

    def __init__(self, model, prompts, *, tiles, max_new_tokens, sampling):
        (prompt,) = prompts
        self.seen.append((prompt, tiles))
        self.settings = (max_new_tokens, sampling)

    def __iter__(self):
        ids = TOKENIZER.encode(self.answers.pop(0))
        for start in range(0, len(ids), 3):
            yield [ids[start : start + 3]]


class Model:
    config = CONFIG
    directory = mini_directory()


@pytest.fixture
def script(monkeypatch) -> type[Scripted]:
    """What the model will say, and what it was given."""
    Scripted.answers, Scripted.seen = [], []
    monkeypatch.setattr(chat_module, "Generation", Scripted)
    return Scripted


def given(messages, **options) -> list[int]:
    """Token ids of a whole conversation in the format of the releases."""
    return render(messages, TOKENIZER, CONFIG, **options).token_ids


def test_everything_said_is_in_the_next_prompt(script):
    """Question, answer and system message: a model that forgets its own answers contradicts itself."""
    script.answers += ["I see.", "Both.", "Yes."]
    chat = Chat(Model(), system="Be brief.")
    said = [{"role": "system", "content": "Be brief."}]
    for question, answer in (("One?", "I see."), ("Two?", "Both."), ("Three?", "Yes.")):
        assert chat(question) == answer
        said.append({"role": "user", "content": question})
        assert script.seen[-1][0] == given(said)
        said.append({"role": "assistant", "content": answer})
        assert chat.messages == said


def test_reset_forgets_all_but_the_system_message(script):
    script.answers += ["a", "b", "c"]
    chat = Chat(Model(), system="Be brief.")
    chat("One?")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat("Two?")
    assert script.seen[-1][0] == given([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}])
    without = Chat(Model())
    without.reset()
    assert without.messages == []


def test_text_held_back_for_a_stop_string_comes_at_the_end(script):
    """`almost EN` might have gone on to `END`; when nothing comes any more it must be said, and remembered."""
    script.answers += ["almost EN", "half é"]
    chat = Chat(Model(), stop=["END", "é!"])
    assert "".join(chat.stream("One?")) == "almost EN"
    assert chat("Two?") == "half é"
    assert [message["content"] for message in chat.messages] == ["One?", "almost EN", "Two?", "half é"]


def test_a_stop_string_ends_the_answer(script):
    script.answers += ["one. END two END"]
    chat = Chat(Model(), stop=["END"])
    assert chat("?") == "one. "
    assert chat.messages[-1] == {"role": "assistant", "content": "one. "}


def test_half_a_character_at_the_end_is_shown_as_such(script, monkeypatch):
    monkeypatch.setattr(Scripted, "__iter__", lambda self: iter([[TOKENIZER.encode("aé")[:-1]]]))
    assert Chat(Model())("?") == "a\ufffd"


def test_an_answer_that_breaks_off_leaves_no_trace(script, monkeypatch):
    """The conversation grows by a question and its whole answer, or not at all."""
    script.answers += ["a long answer"]
    chat = Chat(Model())
    stream = chat.stream("?")
    next(stream)
    stream.close()
    assert chat.messages == []

    def broken(self):
        yield [[1]]
        raise UserError("no room")

    monkeypatch.setattr(Scripted, "__iter__", broken)
    with pytest.raises(UserError):
        chat("?")
    assert chat.messages == []


def test_a_picture_stays_what_it_was(script, tmp_path):
    """The next turn sees the picture of the first, though its file is gone and the object painted over."""
    file = tmp_path / "red.png"
    RED.save(file)
    painted = RED.copy()
    script.answers += ["Red.", "Still.", "Yes."]
    chat = Chat(Model())
    chat("What?", images=[file, painted])
    file.unlink()
    painted.paste("blue", (0, 0, 60, 32))
    chat("And now?")
    tiles, _ = tile_image(RED, CONFIG.vision)
    for _, seen in script.seen:
        np.testing.assert_array_equal(seen, np.concatenate([tiles, tiles]))
    pictures = [{"type": "image", "image": RED}] * 2
    question = {"role": "user", "content": [*pictures, {"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": "Red."}
    assert script.seen[-1][0] == given([question, answer, {"role": "user", "content": "And now?"}])


def test_pictures_for_a_model_without_eyes(script):
    class Blind(Model):
        config = mj.Config(text=CONFIG.text, vision=None, image_token_index=CONFIG.image_token_index, bos_token_id=0, eos_token_id=(1,))

    chat = Chat(Blind())
    with pytest.raises(UserError, match="no vision tower"):
        chat("What?", images=[RED])


def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word
    """
    return word


def test_tools_are_in_every_prompt(script, tmp_path):
    """Of a checkpoint without a template in the format of the releases, of one with through its template."""
    script.answers += ["a", "b", "c"]

    class Plain(Model):
        directory = tmp_path

    (tmp_path / "tokenizer.json").write_bytes((mini_directory() / "tokenizer.json").read_bytes())
    chat = Chat(Plain(), tools=[look_up])
    for question in ("One?", "Two?"):
        chat(question)
        assert "Looks a word up." in TOKENIZER.decode(script.seen[-1][0])
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ tools[0].function.name }}{{ messages | length }}")
    Chat(Plain(), tools=[look_up])("Three?")
    assert script.seen[-1][0] == TOKENIZER.encode("<|begin_of_text|>look_up1", allow_special=True)


def test_settings_reach_the_generation(script):
    script.answers += ["a"]
    chat = Chat(Model(), max_new_tokens=7, temperature=0.5, seed=3)
    chat("?")
    max_new_tokens, sampling = chat.last.settings
    assert (max_new_tokens, sampling.temperature, sampling.seed) == (7, 0.5, 3)


def test_a_model_from_nowhere():
    class Lost(Model):
        directory = None

    with pytest.raises(UserError, match="not loaded from a directory"):
        Chat(Lost())
