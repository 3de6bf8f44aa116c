"""A form is checked before anything is compiled, and a schema without a finite answer is found."""

import pytest

from maverick_jax.errors import UserError
from maverick_jax.inference.grammar.form import LONGEST, Grammar, can_end


def test_equal_forms_are_one():
    """What is compiled is kept by the form: a dict and its text are the same schema, a list and a tuple the same choice."""
    assert Grammar(json_schema={"type": "integer"}) == Grammar(json_schema='{"type":  "integer"}')
    assert hash(Grammar(choice=["a", "b"])) == hash(Grammar(choice=("a", "b")))
    assert Grammar(regex="a") != Grammar(choice=["a"])
    assert Grammar(json_schema=True) == Grammar(json_schema={})


@pytest.mark.parametrize("kind", ["regex", "lark", "choice", "json_schema"])
def test_a_form_may_be_so_long_and_no_longer(kind):
    """Compiling is paid by the character."""

    def form(length: int) -> Grammar:
        text = "x" * (length - len(Grammar(**{kind: given("")}).text)) if kind in ("choice", "json_schema") else "x" * length
        return Grammar(**{kind: given(text)})

    def given(text: str):
        return {"choice": [text], "json_schema": {"title": text}}.get(kind, text)

    assert len(form(LONGEST).text) == LONGEST
    with pytest.raises(UserError, match=f"{kind} has 262,145 characters"):
        form(LONGEST + 1)


def node(**more) -> dict:
    return {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]} | more


ENDLESS = {
    "itself": node(),
    "at least one of itself": {"type": "array", "items": {"$ref": "#/$defs/node"}, "minItems": 1},
    "at the second place": {"type": "array", "prefixItems": [{}, {"$ref": "#/$defs/node"}], "minItems": 2},
    "either of two": {"anyOf": [{"$ref": "#/$defs/node"}, node()]},
    "all of": {"allOf": [{}, {"$ref": "#/$defs/node"}]},
    "through another": {"$ref": "#/$defs/a~1b%20c"},
}
FINITE = {
    "not required": node(required=[]),
    "or null": {"oneOf": [{"type": "null"}, node()]},
    "maybe none": {"type": "array", "items": {"$ref": "#/$defs/node"}},
    "behind what is needed": {"type": "array", "prefixItems": [{}, {"$ref": "#/$defs/node"}], "minItems": 1},
    "any type": {"properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]},
    "yes or no": True,
    "elsewhere": {"$ref": "http://example.org/x"},
    "an anchor": {"$ref": "#place"},
    "nowhere": {"$ref": "#/$defs/node/anyOf/0"},
}


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
def test_a_schema_that_requires_itself_has_no_answer(schema):
    """It would be written until the context is full, and thrown away."""
    assert not can_end({"$ref": "#/$defs/node", "$defs": {"a/b c": node(), "node": schema}})


@pytest.mark.parametrize("schema", FINITE.values(), ids=FINITE)
def test_a_schema_that_may_hold_itself_has_answers(schema):
    """A list, a tree: the usual reason for a reference."""
    assert can_end({"$ref": "#/$defs/node", "$defs": {"node": schema}})


def test_a_chain_of_references_is_followed_to_its_end():
    """However long, and in either direction."""
    for order in (1, -1):
        links = [(f"a{i}", {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]}) for i in range(50)][::order]
        for last, finite in ((True, True), ({"$ref": "#/$defs/a0"}, False)):
            assert can_end({"$ref": "#/$defs/a0", "$defs": dict(links) | {"a50": last}}) is finite
