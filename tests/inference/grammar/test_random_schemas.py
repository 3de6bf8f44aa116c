"""Five hundred random JSON schemas: whatever is drawn from what the masks allow is valid, says an independent validator."""

import json
import random
import string
from typing import Any

import numpy as np
import pytest

from maverick_jax.assets import mini_directory
from maverick_jax.inference.grammar import Grammar, Grammars
from maverick_jax.prompt import Tokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
jsonschema = pytest.importorskip("jsonschema")

SCHEMAS = 500
LONGEST = 4000  # tokens of an answer
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
PATTERNS = ("^[a-c]{2,5}$", "^(x|yy)+z?$", "[0-9]", "^A", "^b*$", r"^\d{1,3}-\w+$")
NAMES = [*string.ascii_lowercase[:8], 'q"uote', "back\\slash", "é", "with space", ""]


class RandomSchema:
    """A schema of what llguidance implements, nested at most `depth` deep."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.definitions: dict[str, Any] = {}
        self.whole = {"$defs": self.definitions, **self.any_type(3)}

    def maybe(self, share: float = 0.4) -> bool:
        return self.draw.random() < share

    def any_type(self, depth: int) -> dict[str, Any]:
        flat = [self.text, self.integer, self.number, self.enum, self.const, self.flag, self.nothing]
        nested = [self.object, self.array, self.tuple, self.any_of, self.all_of, self.reference]
        chosen = self.draw.choice(flat + nested * 2) if depth else self.draw.choice(flat)
        return chosen(depth - 1) if chosen in nested else chosen()

    def text(self) -> dict[str, Any]:
        kind = self.draw.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self.draw.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.draw.choice(FORMATS)}
        least = self.draw.randrange(4)
        return {"type": "string"} | ({"minLength": least, "maxLength": least + self.draw.randrange(9)} if self.maybe(0.8) else {})

    def integer(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer"}
        if self.maybe():
            schema["minimum"] = self.draw.randrange(-1000, 1000)
        if self.maybe():
            schema[self.draw.choice(["maximum", "exclusiveMaximum"])] = schema.get("minimum", 0) + self.draw.randrange(20, 500)
        if self.maybe(0.2):
            schema["multipleOf"] = self.draw.choice([2, 3, 7])
        return schema

    def number(self) -> dict[str, Any]:
        least = round(self.draw.uniform(-100, 100), 2)
        return {"type": "number"} | ({"minimum": least, "maximum": least + 10.5} if self.maybe() else {})

    def enum(self) -> dict[str, Any]:
        return {"enum": self.draw.sample(["a", "b\n", 1, -2.5, True, None, [1, "x"], {"k": "v"}, "😀"], self.draw.randrange(1, 5))}

    def const(self) -> dict[str, Any]:
        return {"const": self.draw.choice(["fixed", 0, False, None, [1, [2]], {"a": {"b": "c"}}])}

    def flag(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def nothing(self) -> dict[str, Any]:
        return {"type": ["null", "boolean"]}

    def object(self, depth: int) -> dict[str, Any]:
        names = self.draw.sample(NAMES, self.draw.randrange(5))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.any_type(depth) for name in names}}
        schema["required"] = [name for name in names if self.maybe(0.6)]
        if self.maybe(0.7):
            schema["additionalProperties"] = False if self.maybe(0.7) else self.any_type(0)
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        least = self.draw.randrange(3)
        return {"type": "array", "items": self.any_type(depth), "minItems": least, "maxItems": least + self.draw.randrange(4)}

    def tuple(self, depth: int) -> dict[str, Any]:
        items = [self.any_type(depth) for _ in range(self.draw.randrange(1, 4))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any_type(depth) for _ in range(self.draw.randrange(1, 4))]}

    def all_of(self, depth: int) -> dict[str, Any]:
        return {"allOf": [self.any_type(depth)]}

    def reference(self, depth: int) -> dict[str, Any]:
        name = f"d{len(self.definitions)}"
        self.definitions[name] = {}  # its place, for what it refers to comes behind
        self.definitions[name] = self.any_type(depth)
        return {"$ref": f"#/$defs/{name}"}


def drawn(grammars, grammar: Grammar, tokenizer: Tokenizer, seed: int) -> str:
    """An answer drawn from the masks alone, which likes what ends something: at random a text would go on for ever."""
    random_ = np.random.default_rng(seed)
    ending = np.array([any(c in tokenizer.bytes_of(id) for c in b'"}]') for id in range(grammars.vocabulary)])
    matcher, mask_1W, ids = grammars.matcher(grammar), np.empty((1, grammars.words), np.uint32), []
    while not matcher.finished:
        grammars.fill([(matcher, 0, ())], mask_1W)
        allowed = np.flatnonzero(np.unpackbits(mask_1W.view(np.uint8), bitorder="little"))
        liked = allowed[ending[allowed]]
        ids.append(int(random_.choice(liked if len(liked) and random_.random() < 0.3 else allowed)))
        matcher.accept(ids[-1])
        assert len(ids) < LONGEST
    return tokenizer.decode(ids)


@pytest.mark.parametrize("part", range(5))
def test_every_answer_is_valid(part):
    """Not only one token after the other: also what `$ref`, `anyOf`, bounds and patterns say together."""

    tokenizer = Tokenizer.from_directory(mini_directory())
    grammars = Grammars(tokenizer, vocabulary=340, end_ids=[tokenizer.id_of("<|eot|>"), tokenizer.id_of("<|end_of_text|>")])
    for seed in range(part * SCHEMAS // 5, (part + 1) * SCHEMAS // 5):
        schema = RandomSchema(seed).whole
        answer = drawn(grammars, Grammar(json_schema=schema), tokenizer, seed)
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(json.loads(answer))
