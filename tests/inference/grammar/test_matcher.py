"""Masks of forms: exactly what may come, drafts included, and one clear error for a form that cannot be had."""

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maverick_jax.assets import mini_directory
from maverick_jax.errors import UserError
from maverick_jax.inference.grammar import Grammar, Grammars, Matcher
from maverick_jax.inference.grammar import matcher as module
from maverick_jax.prompt import Tokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

TOKENIZER = Tokenizer.from_directory(mini_directory())
VOCABULARY = 340  # twelve more than the tokenizer has
END, OTHER_END = (TOKENIZER.id_of(token) for token in ("<|eot|>", "<|end_of_text|>"))
ENDS = [END, OTHER_END]
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
# A part of it that nothing can be, which llguidance learns only there.
DEAD_END = Grammar(lark='start: "a" NOTHING | "c"\nNOTHING: /x/ & /y/')
# Its automaton has 2^16 states: what each answer needs of them is its own.
MANY_STATES = Grammar(regex="(a|b)*a(a|b){15}")


def make() -> Grammars:
    return Grammars(TOKENIZER, vocabulary=VOCABULARY, end_ids=ENDS)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return make()


@pytest.fixture(params=[1, 99], ids=["in threads", "one by one"])
def both_ways(request, monkeypatch):
    """Few rows are filled without llguidance's threads."""
    monkeypatch.setattr(module, "TOGETHER", request.param)


def masks(grammars: Grammars, *rows: tuple[Matcher, list[int]]) -> list[set[int]]:
    """The tokens that each mask allows; what no mask is written to stays as it was, which is everything."""
    starts = np.cumsum([0, *(1 + len(draft) for _, draft in rows)])
    masks_NW = np.full((starts[-1], grammars.words), 2**32 - 1, np.uint32)
    grammars.fill([(matcher, int(at), draft) for (matcher, draft), at in zip(rows, starts, strict=False)], masks_NW)
    bits = np.unpackbits(masks_NW.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def follows(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether an answer may be `text` and end there."""
    matcher = grammars.matcher(grammar)
    ids = TOKENIZER.encode(text)
    if matcher.allowed(ids) != ids:
        return False
    for id in ids:
        matcher.accept(id)
    return END in masks(grammars, (matcher, []))[0]


def could_come(choice: list[bytes], so_far: bytes) -> tuple[set[int], bool]:
    """By comparing all tokens with all choices: what may come, and whether the next byte is certain."""
    spelled = {id: TOKENIZER.bytes_of(id) for id in range(VOCABULARY)}
    left = [word for word in choice if word.startswith(so_far)]
    allowed = {id for id, piece in spelled.items() if piece and any(word.startswith(so_far + piece) for word in left)}
    next_bytes = {word[len(so_far) : len(so_far) + 1] for word in left}
    return allowed | (set(ENDS) if b"" in next_bytes else set()), len(next_bytes) == 1


@settings(max_examples=100, deadline=None)
@given(choice=st.lists(st.text('abé😀"\\ \n|/', max_size=6), min_size=1, max_size=5), data=st.data())
def test_a_mask_allows_what_can_still_become_a_choice_and_nothing_else(grammars, choice, data):
    """One token too many ends in an invalid answer, one too few in an answer that the model did not want. Where bytes are certain,
    only the token that the tokenizer would write for them is left."""
    matcher, so_far = grammars.matcher(Grammar(choice=choice)), b""
    while True:
        (allowed,) = masks(grammars, (matcher, []))
        expected, certain = could_come([word.encode() for word in choice], so_far)
        assert allowed == expected or (certain and len(allowed) == 1 and allowed < expected)
        token = data.draw(st.sampled_from(sorted(allowed)))
        matcher.accept(token)
        so_far += TOKENIZER.bytes_of(token)
        if matcher.finished:
            assert so_far.decode() in choice
            return


@pytest.mark.parametrize(
    "grammar, good, bad",
    [
        (Grammar(json_object=True), ['{"a": [1, {"b": null}]}', "{}"], ["[1]", "1", '{"a": 1,}', "{'a': 1}"]),
        (Grammar(json_schema=True), ["1", '"x"', "[[], {}]"], ["x", "01"]),
        (Grammar(json_schema='{"type": "integer"}'), ["12", "-1"], ["1.5", '"1"']),
        (Grammar(regex=r"\d{2,3}(-[a-z]+)?"), ["12", "123-ab"], ["1", "12-", "x12"]),
        (Grammar(lark='start: "say " WORD\nWORD: /[a-z]+/'), ["say yes"], ["say ", "say 1"]),
        (Grammar(lark='root ::= "say " [a-z]+'), ["say yes"], ["say ", "say 1"]),
        (Grammar(choice=["ja", "nein"]), ["ja", "nein"], ["j", "neinja", ""]),
        (Grammar(choice=("<|eot|>", "a<|patch|>")), ["<|eot|>", "a<|patch|>"], ["a"]),
    ],
    ids=["object", "anything", "schema text", "regex", "lark", "gbnf", "choice", "spelled like special tokens"],
)
def test_forms(grammars, grammar, good, bad):
    """Every kind of form holds, from the first character to the last."""
    assert [text for text in good if not follows(grammars, grammar, text)] == []
    assert [text for text in bad if follows(grammars, grammar, text)] == []


def test_a_special_token_is_not_its_name(grammars):
    """A form that lets `<|patch|>` be written lets the letters be written, and no picture be announced."""
    (allowed,) = masks(grammars, (grammars.matcher(Grammar(regex="(<[|]patch[|]>|<[|]image[|]>)+")), []))
    assert allowed.isdisjoint(TOKENIZER.special.values())
    (anything,) = masks(grammars, (grammars.matcher(Grammar(regex=r"[\s\S]+")), []))
    assert anything.isdisjoint([*TOKENIZER.special.values(), *range(328, VOCABULARY)])


def test_json_may_be_indented_but_not_blank_for_ever(grammars):
    """A model that writes blanks where they are allowed without bound fills its answer with them."""
    grammar, value = Grammar(json_schema=PERSON), {"name": "x", "age": 5}
    for text in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":")), '{\n\t"name": "x", "age": 5\n}'):
        assert follows(grammars, grammar, text)
    for blank in ("  ", "\n" + " " * 41, "\n\n", " \n", "\t"):
        assert not follows(grammars, grammar, '{"name":"x",' + blank + '"age":5}')


def test_finished_as_soon_as_nothing_can_follow(grammars):
    """A complete object needs no step for its end token; a number may have more digits."""
    for grammar, text, finished in [(Grammar(json_schema=PERSON), '{"name":"","age":5}', True), (Grammar(regex="[0-9]{1,3}"), "12", False)]:
        matcher = grammars.matcher(grammar)
        for id in TOKENIZER.encode(text):
            assert not matcher.finished
            matcher.accept(id)
        assert matcher.finished is finished
        matcher.accept(OTHER_END)
        assert matcher.finished


def test_a_draft_has_the_masks_of_its_tokens(grammars, both_ways):
    """Each as if the tokens before it had been accepted, whatever stands in the rows beside it; the matcher stays where it was."""
    grammar = Grammar(json_schema=PERSON)
    drafted, before, behind, alone = (grammars.matcher(grammar) for _ in range(4))
    draft = TOKENIZER.encode('{"name": "a", "age": 12}')
    found = masks(grammars, (before, []), (drafted, draft), (behind, []))
    expected = masks(grammars, (alone, []))
    for id in draft:
        alone.accept(id)
        expected += masks(grammars, (alone, []))
    assert found[1:-1] == expected
    assert found[0] == found[-1] == expected[0]
    assert masks(grammars, (drafted, [])) == expected[:1]
    drafted.accept(draft[0])


def test_a_draft_is_cut_where_the_form_does_not_let_it_pass(grammars):
    """Before an end token too: nothing comes behind it that a mask could be made for."""
    matcher = grammars.matcher(Grammar(choice=["yes", "yes or no"]))
    yes = TOKENIZER.encode("yes")
    assert matcher.allowed(TOKENIZER.encode("yes and")) == TOKENIZER.encode("yes ")
    assert matcher.allowed([*yes, END, END]) == yes
    assert matcher.allowed(TOKENIZER.encode("no")) == []
    assert matcher.allowed([]) == []


UNSATISFIABLE = {
    "false": {"json_schema": False},
    "lengths": {"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}},
    "required but impossible": {"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "no whole number between": {"json_schema": {"type": "integer", "minimum": 5.2, "maximum": 5.8}},
    "two types at once": {"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    "no such type": {"json_schema": {"type": "text"}},
    "not implemented": {"json_schema": {"type": "array", "uniqueItems": True}},
    "a schema from elsewhere": {"json_schema": {"$ref": "http://example.org/schema"}},
    "a reference to nothing": {"json_schema": {"$ref": "#/$defs/a"}},
    "nested too deep": {"json_schema": '{"items":' * 300 + "{}" + "}" * 300},
    "without end": {"json_schema": {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}},
    "parenthesis": {"regex": "(a"},
    "look-around": {"regex": "(?=a)b"},
    "no character": {"regex": r"[^\x00-\U0010ffff]"},
    "no such rule": {"lark": "start: number"},
    "rules of rules": {"lark": 'start: a\na: b\nb: a "x"'},
    "no grammar": {"lark": "yes or no"},
}


@pytest.mark.parametrize("form", UNSATISFIABLE.values(), ids=UNSATISFIABLE)
def test_a_form_that_cannot_be_had_is_refused_before_it_is_used(grammars, form):
    """One line that names the kind, and no later step fails for it."""
    with pytest.raises(UserError, match=f"^no answer can be held to this {next(iter(form))} .*: mend it.$") as caught:
        grammars.matcher(Grammar(**form))
    assert "<" not in str(caught.value)
    assert re.search(r"\(.{5,}\)", str(caught.value))


def test_a_dead_end_ends_its_own_answer_and_no_other(grammars, both_ways):
    """No token is left: the mask has the end tokens, so that a draw finds one, and the matcher says that this is no valid end."""
    dead, alive = grammars.matcher(DEAD_END), grammars.matcher(Grammar(choice=["yes"]))
    dead.accept(*TOKENIZER.encode("a"))
    assert masks(grammars, (dead, []), (alive, [])) == [set(ENDS), {TOKENIZER.encode("yes")[0], *TOKENIZER.encode("y")}]
    with pytest.raises(UserError, match="after 1 tokens the lark lets no answer go on"):
        dead.accept(END)
    assert masks(grammars, (dead, []), (alive, []))[0] == set(ENDS)
    alive.accept(TOKENIZER.encode("yes")[0])


def test_a_draft_into_a_dead_end_does_not_end_the_answer(grammars, both_ways):
    """It was only proposed."""
    matcher = grammars.matcher(DEAD_END)
    a, c = TOKENIZER.encode("ac")
    assert masks(grammars, (matcher, [a])) == [{a, c}, set(ENDS)]
    matcher.accept(c)
    assert matcher.finished


def test_an_answer_survives_the_automaton_that_others_filled(monkeypatch, both_ways):
    """All answers of a form share it and it is bounded: a form that was used long enough would fail for everybody."""
    monkeypatch.setattr(module, "STATES", 300)
    grammars, letters = make(), TOKENIZER.encode("ab")
    drafted = grammars.matcher(MANY_STATES)
    for seed in range(6):  # one needs fewer than three hundred states, all of them more
        matcher, drawn = grammars.matcher(MANY_STATES), np.random.default_rng(seed).integers(0, 2, 60)
        for i, letter in enumerate(drawn.tolist()):
            allowed, first, _ = masks(grammars, (matcher, []), (drafted, letters[:1]))
            assert allowed - set(ENDS) == first - set(ENDS) == set(letters), (seed, i)
            matcher.accept(letters[letter])


def test_an_automaton_that_one_answer_fills_is_its_own_error(monkeypatch):
    """The line names the form, and the answer ends."""
    monkeypatch.setattr(module, "STATES", 150)
    grammars = make()
    matcher = grammars.matcher(MANY_STATES)
    letters = np.random.default_rng(0).choice(TOKENIZER.encode("ab"), 1000).tolist()
    with pytest.raises(UserError, match=r"the regex lets no answer go on \(lexer error: too many states"):
        list(map(matcher.accept, letters))


def test_forms_are_compiled_once_and_the_oldest_are_forgotten(monkeypatch):
    """A hundred answers to one schema wait once."""
    monkeypatch.setattr(module, "KEPT", 2)
    grammars, compiled = make(), []
    compile_it = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: compiled.append(grammar.text) or compile_it(grammar))
    for text in "a b a c a b".split():
        grammars.matcher(Grammar(regex=text))
    assert compiled == ["a", "b", "c", "b"]


def test_a_long_chain_of_rules_does_not_end_the_process():
    """llguidance calls itself for every link: in a usual thread four thousand are a segmentation fault."""
    code = """
from test_matcher import *
links = 3000
chain = {f"a{i}": {"properties": {"n": {"$ref": f"#/$defs/a{i + 1}"}}, "type": "object"} for i in range(links)}
matcher = make().matcher(Grammar(json_schema={"$ref": "#/$defs/a0", "$defs": {**chain, f"a{links}": {"type": "integer"}}}))
rules = "\\n".join(f'a{i}: "x" a{i + 1} | "y"' for i in range(9000))
print(follows(make(), Grammar(lark=f'start: a0\\n{rules}\\na9000: "z"'), "xxxy"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=__file__.rpartition("/")[0], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-2000:]


def test_a_form_that_takes_for_ever_is_given_up(monkeypatch):
    """And only so many hold a thread: the next is refused at once, until one of them has ended."""
    monkeypatch.setattr(module, "COMPILING_S", 0.01)
    monkeypatch.setattr(module, "_compilers", threading.BoundedSemaphore(1))
    hold = threading.Event()
    grammars, slow = make(), Grammar(regex="slow")
    compiling = []

    def compile_one(grammar):
        compiling.append(grammar)
        hold.wait()
        return None, ""

    with monkeypatch.context() as patch:
        patch.setattr(grammars, "_compile", compile_one)
        for _ in range(2):
            with pytest.raises(UserError, match=r"this regex takes more than 0.01 seconds"):
                grammars.matcher(slow)
    assert compiling == [slow]  # the second time it was known
    with pytest.raises(UserError, match=r"the forms before this one take too long"):
        grammars.matcher(Grammar(regex="quick"))
    hold.set()
    monkeypatch.setattr(module, "COMPILING_S", 30)
    assert follows(grammars, Grammar(regex="quick"), "quick")


def test_trouble_with_a_mask_is_its_rows_alone(monkeypatch):
    """A form that has to be made again may take too long: the others' masks are made all the same, and its own row is told."""
    grammars = make()
    ill, well = grammars.matcher(Grammar(regex="a+")), grammars.matcher(Grammar(regex="b+"))

    def trouble():
        raise UserError("this regex takes more than 30 seconds")

    monkeypatch.setattr(ill, "_mended", trouble)
    made = masks(grammars, (ill, []), (well, []))
    assert made[1] == masks(grammars, (grammars.matcher(Grammar(regex="b+")), []))[0]
    with pytest.raises(UserError, match="more than 30 seconds"):
        ill.accept(TOKENIZER.encode("a")[0])


def test_a_missing_library_is_named(monkeypatch):
    """With what installs it."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'maverick-jax\[grammar\]'"):
        make().matcher(Grammar(regex="a"))


def test_many_threads_submit_at_once():
    """Each gets its own matcher, and all of them the form."""
    grammars, found = make(), []

    def submit(word: str) -> None:
        matcher = grammars.matcher(Grammar(choice=[word, word + "!"]))
        for id in TOKENIZER.encode(word + "!"):
            matcher.accept(id)
        found.append(matcher.finished)

    threads = [threading.Thread(target=submit, args=(word,)) for word in "yes no maybe left right".split() * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * len(threads)
