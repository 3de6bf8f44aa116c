"""Prompts through a checkpoint's template equal those of transformers, token for token."""

import inspect

import pytest

pytest.importorskip("transformers", reason="the oracle is transformers")

from transformers.models.llama4 import processing_llama4
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

from maverick_jax.errors import UserError
from maverick_jax.prompt import ChatTemplate, render
from maverick_jax.prompt.chat import image_tokens
from maverick_jax.prompt.tools import tool_schema
from maverick_jax.training.mini.definition import mini_config, mini_tokenizer
from oracle.conversations import (
    CALLING,
    NAMED,
    PICTURES,
    PLAIN,
    THINKING,
    WITH_TOOLS,
    add,
    assistant,
    our_tokenizer,
    system,
    text,
    their_tokenizer,
    user,
    weather,
)

STRIPS_THINKING = """
{%- macro body(content) -%}
    {%- if content is string %}{{ content }}{%- elif content is not none %}
        {%- for part in content or [] %}{{ '<|image|>' if part.type == 'image' else part.text }}{%- endfor %}
    {%- endif %}
{%- endmacro -%}
{{- bos_token }}
{%- set ns = namespace(last=-1, text='') %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- set content = body(message.content) | trim %}
    {{- '<|header_start|>' ~ message.role ~ '<|header_end|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
        {%- generation %}{{ content }}{% endgeneration %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '<tool_call>' ~ (tool_call.function | default(tool_call) | tojson) ~ '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n<think>\\n' }}{% endif %}
"""

WALKS_TOOLS = """{{ bos_token }}
{%- macro describe(name, spec, depth=0) %}
{{ '  ' * depth }}{{ name }}: {{ spec.type if spec.type is string else spec.type | join(' or ') }}
    {%- if spec.enum %} in {{ spec.enum | join(', ') }}{% endif %}
    {%- if spec.description is defined %} // {{ spec.description }}{% endif %}
    {%- for key, value in (spec.properties or {}).items() %}{{ describe(key, value, depth + 1) }}{% endfor %}
{% endmacro %}
{%- if tools %}
    {{- '<|header_start|>system<|header_end|>\\n\\n' }}
    {%- for tool in tools %}
        {%- set tool = tool.function or tool %}
        {{- describe(tool.name, tool.parameters) }}
        {{- tool | tojson(indent=2) }}{{ tool.parameters | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}
    {%- endfor %}
    {{- '<|eot|>' }}
{%- elif tools is not none %}
    {{- '(no tools)' }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' and not tools %}{% continue %}{% endif %}
    {{- '<|header_start|>%s<|header_end|>\\n\\n' % message.role }}
    {%- if message.content is mapping or (message.role == 'tool' and message.content is not string) %}
        {{- message.content | tojson }}
    {%- elif message.content is string %}{{ message.content }}
    {%- else %}
        {%- for part in message.content or [] %}{{ {'image': '<|image|>'}.get(part.type, part.text) }}{% endfor %}
    {%- endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- '<|python_start|>' }}
        {%- for tool_call in message.tool_calls %}
            {%- set f = tool_call.function %}
            {{- f.name ~ '(' }}
            {%- if f.arguments is mapping %}
                {%- for key, value in f.arguments | dictsort %}
                    {{- key ~ '=' ~ (value | tojson) ~ (', ' if not loop.last else '') }}
                {%- endfor %}
            {%- else %}{{ f.arguments }}{% endif %}
            {{- ')' ~ (tool_call.id or '') }}
            {%- if loop.index > 7 %}{% break %}{% endif %}
        {%- endfor %}
        {{- '<|python_end|><|eom|>' }}
    {%- else %}{{ '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|header_start|>assistant<|header_end|>

{% endif %}
"""

MEASURES = """{{ bos_token ~ (strftime_now('%Y') | length) }}
{%- set ns = namespace(total=0, seen=[], all='') %}
{%- for message in messages %}
    {%- set content = message['content'] if message['content'] is string else (message['content'] or '') | string | length | string %}
    {%- set ns.total = ns.total + content | length %}
    {%- set ns.seen = ns.seen + [message.role] %}
    {%- set block %}{{ content | replace('<', '<') | replace('z', 'Z') | replace('Z', 'z') }}{% endset %}
    {%- set ns.all = ns.all ~ '<|header_start|>' ~ message.role[:1] ~ message.role[1:] ~ '<|header_end|>' ~ block %}
    {%- if message.content is not string %}
        {%- for part in message.content or [] if part.type == 'image' %}{% set ns.all = ns.all ~ '<|image|>' %}{% endfor %}
    {%- endif %}
    {%- if content.startswith('<think>') %}{% set ns.all = ns.all ~ 'T' %}{% endif %}
    {%- set ns.all = ns.all ~ (content[-3:] | reverse) ~ content.upper().lower().count('e') ~ '\\n' + eos_token %}
    {%- if message.name is defined %}{% set ns.all = ns.all + message.name | upper %}{% endif %}
{%- endfor %}
{{- (ns.all + '  ') | trim }}
{%- generation %}{{ '{}: {} of {:>4}|'.format(ns.seen | join('+'), ns.total, messages | length) }}{{ '<|eom|>' }}{% endgeneration %}
{{- pad_token if add_generation_prompt else '<|' ~ 'eot' ~ '|>' }}
{{- messages | map(attribute='role') | unique | list | tojson }}
{{- tools | map(attribute='function.name') | join('<|eom|>') if tools and tools[0].function is defined }}
{{- ['<|eot|>', bos_token] | join('-') ~ '<|e{}|>'.format('om') ~ ('<|%s|>' | format('patch')) ~ '  <|eom|> '.strip() }}
"""

TEMPLATES = {"llama 4": processing_llama4.chat_template, "thinking": STRIPS_THINKING, "tools": WALKS_TOOLS, "measures": MEASURES}
CONVERSATIONS = [*PLAIN, *THINKING, *CALLING, *PICTURES]
OURS = our_tokenizer()
CONFIG = mini_config(mini_tokenizer())


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request):
    """One template as transformers' tokenizer and as ours."""
    source = TEMPLATES[request.param]
    return their_tokenizer(source), ChatTemplate({"default": source}, NAMED, request.param)


def expected_ids(theirs, messages, **options) -> list[int]:
    """transformers' ids, with the tokens of one tile in the place of every picture."""
    ids = theirs.apply_chat_template(messages, return_dict=False, **options)
    picture = image_tokens(1, 1, CONFIG.vision.tokens_per_tile, OURS)
    return [token for id in ids for token in (picture if id == OURS.id_of("<|image|>") else [id])]


def agree(both, messages, *, tools=None, **options) -> bool:
    """Whether transformers takes the conversation; if it does, ours must be the same, if not, one line."""
    theirs, template = both
    options = {"add_generation_prompt": True} | options
    try:
        expected = expected_ids(theirs, messages, tools=tools, **options)
    except Exception:
        with pytest.raises(UserError) as refused:
            render(messages, OURS, CONFIG, template=template, tools=tools, **options)
        assert "\n" not in str(refused.value)
        return False
    assert render(messages, OURS, CONFIG, template=template, tools=tools, **options).token_ids == expected
    return True


def test_there_are_enough_conversations():
    assert len(CONVERSATIONS) >= 50


def test_every_conversation(both):
    """A field that does not reach the template, or a filter that behaves otherwise, changes what the model reads."""
    taken = sum(agree(both, messages) for messages in CONVERSATIONS)
    assert taken >= len(CONVERSATIONS) - 4  # what transformers itself refuses: a tool's number as content


@pytest.mark.parametrize("tools", WITH_TOOLS, ids=["none", "empty", "schema", "functions"])
def test_every_conversation_with_tools(both, tools):
    taken = sum(agree(both, messages, tools=tools) for messages in [*PLAIN[:9], *CALLING])
    assert taken >= 15


def test_without_generation_prompt(both):
    assert all(agree(both, messages, add_generation_prompt=False) for messages in [*PLAIN[:8], *CALLING[:8], *PICTURES])


@pytest.mark.parametrize("last", ["The answer", "The answer is ", " x\n", [text("The "), text("answer ")]], ids=repr)
def test_continued_message(both, last):
    """The model goes on within its own words: no end of turn, and trailing blanks as the template leaves them."""
    for messages in ([user("Hello"), assistant(last)], [system("Be brief."), user("Hello"), assistant(last)]):
        agree(both, messages, add_generation_prompt=False, continue_final_message=True)
    agree(both, [user("Hello"), assistant("<think>a</think>b")], add_generation_prompt=False, continue_final_message=True)
    thinks = [user("Hello"), assistant("", reasoning_content="I must")]
    agree(both, thinks, add_generation_prompt=False, continue_final_message="reasoning_content")


def test_named_templates():
    """`tool_use` serves conversations with tools, an empty list of tools included."""
    sources = {"default": "{{ bos_token }}d", "tool_use": "{{ bos_token }}t{{ tools | length }}", "rag": "{{ bos_token }}r"}
    both = their_tokenizer(sources), ChatTemplate(sources, NAMED, "test")
    for tools in WITH_TOOLS:
        assert agree(both, [user("Hello")], tools=tools)
    alone = {"rag": "{{ bos_token }}r"}
    assert not agree((their_tokenizer(alone), ChatTemplate(alone, NAMED, "test")), [user("Hello")])


def nothing():
    """Does
    nothing."""


def many(a: "int", b: str = "x", *, c: bool, d: dict[str, list[int]], e: tuple[int, str], f: list, g: dict = {}, h: int | None = None):  # noqa: B006
    """Does: many things.

    Some more.

    Args:
      a: first
         goes on: here
      b: second

        after a blank
      c: third (Choices: [true, false])
      d: fourth
      e: fifth
      f: sixth: with colon
      g: seventh
      h: eighth
    Raises:
      ValueError: never
    """


def unions(a: int | str | list[int], b: int | list | tuple, c: str | None) -> None:
    """Unions.
    Args:
        a: one
        b: two
        c: three
    Returns:
        nothing
        at all
    """


class Thing:
    def method(self, a: int) -> "Thing":
        """Of a thing.

        Args:
            a: number
        """
        return self


@pytest.mark.parametrize("function", [weather, add, nothing, many, unions, Thing().method], ids=lambda f: f.__name__)
def test_schemas_of_functions(function):
    assert tool_schema(function) == get_json_schema(function)


def no_hint(a):
    """Text.

    Args:
        a: x
    """


def undescribed(a: int):
    """Text."""


def undocumented(a: int): ...


def strange(a: Thing):
    """Text.

    Args:
        a: x
    """


def bad_choices(a: int):
    """Text.

    Args:
        a: x (choices: a, b)
    """


@pytest.mark.parametrize(
    "tool",
    [no_hint, undescribed, undocumented, strange, bad_choices, 7, "f", len, Thing],
    ids=lambda tool: getattr(tool, "__name__", repr(tool)),
)
def test_tools_without_a_schema(tool):
    with pytest.raises(UserError) as refused:
        tool_schema(tool)
    assert "\n" not in str(refused.value)
    if inspect.isfunction(tool):
        with pytest.raises((ValueError, TypeHintParsingException, DocstringParsingException)):
            get_json_schema(tool)
