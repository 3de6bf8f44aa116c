"""Nothing that a conversation brings becomes a control token, whatever the template does with it."""

import json

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given

from maverick_jax.prompt import ChatTemplate, Tokenizer, render
from maverick_jax.training.mini.definition import CHAT_TEMPLATE, mini_config, mini_tokenizer
from oracle.conversations import NAMED, call, description, our_tokenizer

OURS = our_tokenizer()
CONFIG = mini_config(mini_tokenizer())
CONTROL = set(OURS.special.values())

JOINS_PIECES = """{{ bos_token }}
{%- macro flat(content) %}
    {%- if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}
{%- endmacro %}
{%- set ns = namespace(all='') %}
{%- for message in messages %}
    {%- set content = flat(message.content) %}
    {%- set ns.all = ns.all ~ content %}
    {{- '<|header_start|>' + message.role + '<|header_end|>' + message.get('name', '') }}
    {{- content.split('<think>')[0] + content.split('</think>')[-1] }}
    {{- content | replace('x', '') ~ (content | reverse | reverse) ~ content.upper().lower() }}
    {{- '<' ~ content ~ '>' ~ '<|' ~ content ~ '|>' ~ '<|eo' ~ content ~ 't|>' ~ '<|%s|>' % content ~ '<|{}|>'.format(content) }}
    {{- [content, 't|>', content] | join ~ ['<|', content] | join(content) ~ (content * 2) ~ content[:3] ~ content[3:] ~ '|>' }}
    {%- for letter in content %}{{ letter }}{% endfor %}
    {%- for piece in content.split('x') %}{{ piece }}{% endfor %}
    {{- message | tojson ~ (message.items() | list) ~ message }}
    {%- for tool_call in message.tool_calls or [] %}
        {{- tool_call.function.name ~ '(' }}{% for key, value in tool_call.function.arguments.items() %}{{ key ~ '=' ~ value }}{% endfor %}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- endfor %}
{%- for tool in tools or [] %}
    {{- tool.name }}{{ tool | tojson(indent=1) }}{% for key in tool %}{{ key }}{{ tool[key] }}{% endfor %}
{%- endfor %}
{{- ns.all | trim ~ ns.all.strip('<|') ~ ('<|' ~ ns.all ~ '|>') | string }}{{ '<|' ~ 'eot' ~ '|>' }}"""

FRAGMENTS = {  # what is typed, and something harmless of the same length
    "<|eot|>": "wwwwwww", "<": "w", "|": "w", "<|": "ww", "|>": "ww", ">": "w", "eot": "www", "eo": "ww", "<|eo": "wwww", "t|>": "www",
    "<|e": "www", "ot|>": "wwww", "|eot|": "wwwww", "patch": "wwwww", "image": "wwwww", "<|image|>": "wwwwwwwww", "header_start": "w" * 12,
    "<|header_end|>": "w" * 14, "<|header_start|>": "w" * 16, "<|begin_of_text|>": "w" * 17, "x": "x", "</think>": "</think>",
    "<think>": "<think>", "\U000f0000": "\U000f0001", "\\": "w", '"': "w", " ": " ", "\n": "\n", "EOT": "WWW",
}  # fmt: skip


@st.composite
def pairs(draw) -> tuple[str, str]:
    """A text made of pieces of control tokens, and a harmless one of the same length."""
    pieces = draw(st.lists(st.sampled_from(list(FRAGMENTS)), min_size=1, max_size=5))
    return "".join(pieces), "".join(FRAGMENTS[piece] for piece in pieces)


@st.composite
def conversations(draw):
    """The same conversation twice: as somebody who means harm types it, and harmless."""
    both: tuple[list, list] = [], []
    for number in range(draw(st.integers(1, 3))):
        role = draw(st.sampled_from(["user", "assistant"]))
        content, name, key, value, function = (draw(pairs()) for _ in range(5))
        for side, messages in enumerate(both):
            message = {"role": role, "content": content[side], "name": name[side], f"{key[side]}{number}": value[side], "type": key[side]}
            if role == "assistant":
                message["tool_calls"] = [call(function[side], {key[side]: {"role": value[side]}})]
            if number == 1:
                message["content"] = [{"type": "text", "text": text} for text in (content[side], value[side])]
            messages.append(message)
    tool = draw(pairs())
    tools = tuple([{"type": tool[side], "name": tool[side], f"a{tool[side]}": [tool[side]]}] for side in (0, 1))
    return (both[0], tools[0]), (both[1], tools[1])


def control_tokens(messages, tools, template) -> list[int]:
    return [id for id in render(messages, OURS, CONFIG, template=template, tools=tools).token_ids if id in CONTROL]


@pytest.mark.parametrize("source", [JOINS_PIECES, CHAT_TEMPLATE], ids=["joins pieces", "mini"])
@given(conversations=conversations())
def test_what_is_typed_never_controls(source, conversations):
    """The control tokens are those of a harmless conversation: halves in two texts, in a key, around what a template
    takes out or between its own characters never meet to make one."""
    template = ChatTemplate({"default": source}, NAMED, "test")
    typed, harmless = (control_tokens(*conversation, template) for conversation in conversations)
    assert typed == harmless


@given(conversations=conversations())
def test_what_is_typed_never_controls_the_releases_format(conversations):
    typed, harmless = (control_tokens(*conversation, None) for conversation in conversations)
    assert typed == harmless


@given(content=pairs())
def test_what_is_typed_is_what_the_model_reads(content):
    """No character is added, lost or replaced."""
    template = ChatTemplate({"default": CHAT_TEMPLATE}, NAMED, "test")
    ids = render([{"role": "user", "content": content[0]}], OURS, CONFIG, template=template).token_ids
    assert OURS.decode(ids) == f"user\n\n{content[0]}assistant\n\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0].content | length }}", "23"),
        ("{{ '<|eot|>' in messages[0].content }}", "True"),
        ("{{ messages[0].content.split('</think>')[-1] }}", "b<|eot|>"),
        ("{{ messages[0].content.replace('<|eot|>', '!') }}", "<think></think>b!"),
        ("{{ messages[0].content[2:9] | upper }}", "HINK></"),
        ("{% set x = messages[0].content ~ '' %}{{ x.endswith('<|eot|>') }}{{ x | reverse }}", "True" + "<think></think>b<|eot|>"[::-1]),
        ("{{ messages[0].content.count('<') }}{{ messages[0].content.find('<|') }}", "316"),
        ("{{ messages[0].content == '<think></think>b<|eot|>' }}", "True"),
    ],
)
def test_the_template_sees_texts_as_they_are(source, expected):
    """Templates measure, compare, search and cut: a text with anything put in or taken out sends them the wrong way."""
    messages = [{"role": "user", "content": "<think></think>b<|eot|>"}]
    ids = render(messages, OURS, CONFIG, template=ChatTemplate({"default": source}, NAMED, "test")).token_ids
    assert OURS.decode(ids) == expected
    assert not CONTROL & set(ids)


def test_the_templates_own_tokens_control():
    """However a template puts its own words together, as transformers reads them: a known role is such a word."""
    sources = ["<|eot|>", "{{ '<|' ~ 'eot' ~ '|>' }}", "<|{{ 'EOT' | lower }}|>", "{{ '<|%s|>' % 'eot' }}", "{{ ' <|eot|> '.strip() }}"]
    sources += ["{{ eos_token }}", "{{ [eos_token] | join }}", "{% set x %}<|eot|>{% endset %}{{ x | trim }}", "{{ ('<|eot|>x')[:7] }}"]
    sources += [
        "{{ messages[0].content.replace('u', '<|eot|>') }}",
        "{{ '{}{}'.format('<|eo', 't|>') }}",
        "{{ '<|e\not|>' | replace('\n', '') }}",
    ]
    sources += [
        "{{ 'a<|eot|>b'.split('a')[1].removesuffix('b') }}",
        "{{ '<|eot|>' if true }}",
        "{{ {'u': '<|eot|>'}[messages[0].content] }}",
    ]
    for source in sources:
        ids = render([{"role": "user", "content": "u"}], OURS, CONFIG, template=ChatTemplate({"default": source}, NAMED, "test")).token_ids
        assert ids == [OURS.id_of("<|eot|>")], source


def with_tokens(*contents: str) -> Tokenizer:
    """The mini model's tokenizer with further control tokens."""
    made = description()
    first = max(token["id"] for token in made["added_tokens"]) + 1
    template = made["added_tokens"][0]
    made["added_tokens"] += [template | {"id": first + i, "content": content} for i, content in enumerate(contents)]
    return Tokenizer(made)


def test_only_a_known_role_is_the_templates_word():
    """`'<|' + role + '|>'` makes a token of `user`, not of whatever somebody calls a role."""
    tokenizer = with_tokens("<|user|>", "<|admin|>")
    template = ChatTemplate({"default": "{{ '<|' + messages[0].role + '|>' }}"}, NAMED, "test")
    for role, expected in (
        ("user", [tokenizer.id_of("<|user|>")]),
        ("admin", tokenizer.encode("<|admin|>")),
        ("eot", tokenizer.encode("<|eot|>")),
    ):
        assert render([{"role": role, "content": ""}], tokenizer, CONFIG, template=template).token_ids == expected


def test_tokens_that_are_vocabulary_are_one_id_in_every_text():
    """`<think>` is an added token, but not a special one: a user's too is one id, and it shows."""
    text = "a<think>b</think>"
    ids = OURS.encode(text)
    assert [OURS._plain.token_to_id(token) in ids for token in ("<think>", "</think>")] == [True, True]
    assert len(ids) == 4
    assert OURS.decode(ids) == text
    assert OURS.encode("<|eot|>" + text)[-4:] == ids
    theirs = tokenizers.Tokenizer.from_str(json.dumps(description()))
    assert OURS.encode(text + "<|eot|>", allow_special=True) == theirs.encode(text + "<|eot|>", add_special_tokens=False).ids


def test_a_control_token_that_ordinary_splitting_finds():
    """Some tokenizers have their special tokens in the vocabulary too: a typed one must come out in pieces all the same."""
    made = description()
    made["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    made["model"]["vocab"] |= {token["content"]: token["id"] for token in made["added_tokens"]}
    tokenizer = Tokenizer(made)
    assert tokenizer._plain.encode("<|eot|>", add_special_tokens=False).ids == [tokenizer.id_of("<|eot|>")]
    ids = tokenizer.encode("<|eot|>")
    assert not CONTROL & set(ids)
    assert tokenizer.decode(ids) == "<|eot|>"


def test_typed_control_tokens_are_split_as_any_text():
    """Also where the vocabulary joins their characters: `<|` is one id in code of the language F#, and so it is here."""
    made = description()
    made["model"]["vocab"]["<|"] = max(token["id"] for token in made["added_tokens"]) + 1
    made["model"]["merges"].append(["<", "|"])
    without = tokenizers.Tokenizer.from_str(json.dumps(made | {"added_tokens": [], "post_processor": None}))
    expected = without.encode("a<|eot|>").ids
    assert made["model"]["vocab"]["<|"] in expected
    assert Tokenizer(made).encode("a<|eot|>") == expected
