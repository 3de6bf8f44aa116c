"""A conversation: what was said stays said, pictures stay what they were, and no text is lost on the way out.

The model is a stand-in that says what it is told to: what is tested is what it is given and what becomes of its words.
"""

import dataclasses
import inspect

import numpy as np
import pytest
from PIL import Image

import maverick_jax as mj
from maverick_jax.assets import mini_directory
from maverick_jax.errors import UserError
from maverick_jax.inference import chat as chat_module
from maverick_jax.inference.chat import Chat
from maverick_jax.inference.sampling import Sampling
from maverick_jax.prompt import render, tile_image
from oracle.scripted import CONFIG, TOKENIZER, Model, Scripted

RED = Image.new("RGB", (60, 32), "red")


@pytest.fixture
def script(monkeypatch) -> type[Scripted]:
    """What the model will say, and what it was given."""
    Scripted.answers, Scripted.seen = [], []
    monkeypatch.setattr(chat_module, "engine_for", Scripted)
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
    monkeypatch.setattr(Scripted, "__iter__", lambda self: iter(TOKENIZER.encode("aé")[:-1]))
    assert Chat(Model())("?") == "a\ufffd"


@pytest.mark.parametrize("how", ["Ctrl-C", "closed"])
def test_an_answer_that_is_stopped_stays_as_far_as_it_went(script, how):
    """The next question may be about it: the model must know what it has said, and what was asked."""
    script.answers += [["half", KeyboardInterrupt()]]
    chat = Chat(Model())
    stream = chat.stream("Who?", images=[RED])
    said = [next(stream)]
    if how == "closed":
        stream.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            said.extend(stream)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[0]["content"][1] == {"type": "text", "text": "Who?"}
    assert chat.messages[1]["content"] == ("half" if how == "Ctrl-C" else said[0])


@pytest.mark.parametrize("answer", [["a", UserError("no room")], [KeyboardInterrupt()]], ids=["error", "Ctrl-C before the first word"])
def test_what_is_no_answer_leaves_no_trace(script, answer):
    """The conversation grows by a question and its answer, or not at all."""
    script.answers.append(answer)
    chat = Chat(Model())
    with pytest.raises(type(answer[-1])):
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


def test_settings_reach_the_engine(script):
    script.answers += ["a"]
    chat = Chat(Model(), max_new_tokens=7, temperature=0.5, seed=3)
    chat("?")
    asked = chat.last.request
    assert (asked.max_new_tokens, asked.sampling.temperature, asked.sampling.seed) == (7, 0.5, 3)


def test_a_model_from_nowhere():
    class Lost(Model):
        directory = None

    with pytest.raises(UserError, match="not loaded from a directory"):
        Chat(Lost())
    with pytest.raises(UserError, match=r"model is 'OUT': open it with maverick_jax\.load"):
        Chat("OUT")


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(system=5), "system is 5: expected a text"),
        (dict(tools="look_up"), "tools are a list of schemas and functions, not 'look_up'"),
        (dict(tools=[5]), "tool 5 is neither a JSON schema nor a function"),
        (dict(tools=look_up), "tools are a list of schemas and functions"),
        (dict(stop=5), "stop is 5: expected a text or a list of texts"),
        (dict(stop=None), "stop is None"),
        (dict(stop=[""]), "stop holds '': expected texts of at least one character"),
        (dict(stop=[3]), "stop holds 3"),
        (dict(stop=b"x"), "stop is b'x'"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=1.5), "max_new_tokens is 1.5"),
        (dict(temperature="0.5"), "temperature is '0.5': it must be a finite number"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_k=2.7), "top_k is 2.7: it must be a whole number"),
        (dict(top_p=True), "top_p is True"),
        (dict(min_p=2), "min_p is 2"),
        (dict(seed=2**70), "seed is 1180591620717411303424: it must be a whole number between 0 and 2^32 - 1"),
    ],
)
def test_settings_that_are_none(settings, expected):
    """Said when the chat is made, not at the first question."""
    with pytest.raises(UserError) as error:
        Chat(Model(), **settings)
    assert expected in str(error.value)


def test_a_misspelt_setting_names_the_one_that_was_meant():
    """It went on to another function, whose name nobody knows; now type checkers see it too."""
    with pytest.raises(TypeError, match=r"Chat.__init__\(\) got an unexpected keyword argument 'temprature'. Did you mean 'temperature'\?"):
        Chat(Model(), temprature=0.5)
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'max_tokens'. Did you mean 'max_new_tokens'\?"):
        mj.generate(Model(), [[1]], max_tokens=5)
    assert "temperature: 'float' = 0.0" in str(inspect.signature(Chat))


def test_one_stop_string_is_not_its_letters(script):
    script.answers += ["He left. The left digit"]
    assert Chat(Model(), stop="The left")("?") == "He left. "


def test_one_picture_is_not_its_parts(script, tmp_path):
    """A path has letters, an array rows; NumPy arrays, open files and bytes are pictures as well."""
    RED.save(tmp_path / "red.png")
    tiles, grid = tile_image(RED, CONFIG.vision)
    with open(tmp_path / "red.png", "rb") as file:
        pictures = [RED, tmp_path / "red.png", str(tmp_path / "red.png"), file, file.read(), np.asarray(RED), (tiles, grid)]
        script.answers += ["a"] * (len(pictures) + 1)
        for picture in pictures:
            Chat(Model())("?", images=picture)
        Chat(Model())("?", images=(picture for picture in [RED]))
    for ids, seen in script.seen:
        assert ids == script.seen[0][0]
        np.testing.assert_array_equal(seen, tiles)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((5,), "the question is 5: expected a text"),
        ((["?"],), "the question is ['?']"),
        (("?", 5), "images is 5: expected a list of pictures"),
        (("?", [5]), "picture 5 is neither"),
        (("?", None), "images is None"),
        (("?", [(np.zeros((1, 3, 5, 5)), (1, 1))]), "no pair of tiles and (rows, columns)"),
        (("?", np.zeros((2, 3, 32, 32))), "like tiles: give the pair that tile_image returned"),
    ],
)
def test_questions_that_are_none(arguments, expected):
    with pytest.raises(UserError) as error:
        Chat(Model()).stream(*arguments)
    assert expected in str(error.value)


def test_settings_may_change_between_two_questions(script):
    """`Sampling` is public: a chat takes another one, `generate` its parts."""
    script.answers += ["a", "b"]
    chat = Chat(Model(), seed=3)
    chat("?")
    chat.sampling = Sampling(temperature=0.5)
    chat("?")
    assert chat.last.request.sampling.temperature == 0.5
    assert set(dataclasses.asdict(chat.sampling)) - {"logprobs"} < set(inspect.signature(mj.generate).parameters)


def test_what_is_shown_of_them_is_short(script):
    """In a notebook the value of the last line is shown: not ten thousand numbers."""
    script.answers += ["a"]
    chat = Chat(Model())
    chat("?", images=[RED])
    assert repr(chat) == f"Chat('{mini_directory()}', 2 messages)"
    prompt = chat.prompt(chat.messages)
    assert repr(prompt) == f"Prompt({len(prompt.token_ids)} tokens, tiles [3, 3, 32, 32])"
    assert repr(chat.template) == f"ChatTemplate('{mini_directory()}': default)"
    assert repr(chat.tokenizer) == f"Tokenizer({CONFIG.text.vocab_size} tokens, {len(TOKENIZER.special)} of them special)"
