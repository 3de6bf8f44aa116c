"""A chat template is a program from the internet: it reaches nothing, costs little, and ends in one line whatever it does."""

import json
import os
import resource
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from maverick_jax.errors import UserError
from maverick_jax.prompt import ChatTemplate, load_template, render
from maverick_jax.prompt.budget import OUTPUT, STEPS
from maverick_jax.prompt.sandbox import ChatEnvironment
from maverick_jax.prompt.template import MAX_SOURCE
from oracle.conversations import NAMED, our_tokenizer

OURS = our_tokenizer()
NEST = """{% set ns = namespace(x=('a',), y=('a',)) %}
{%- for i in range(64) %}{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}"""
SHORT = {"BIG": "{% set big = 'ab' * 500000 %}", "NEST": NEST, "MANY": "{% if 1 %}{% endif %}" * 3000}


def listed(lines: str) -> list[str]:
    """A template per line, in which words stand for what is too long to write: `FOREVER` a loop around what follows."""
    templates = []
    for line in lines.strip().splitlines():
        before, loop, body = line.partition("FOREVER ")
        line = f"{before}{{% for i in range(99999) %}}{body}{{% endfor %}}" if loop else line
        for word, meaning in SHORT.items():
            line = line.replace(word, meaning)
        templates.append(line)
    return templates


COSTLY = listed(r"""
{{ 10 ** (10 ** 8) }}
{% set x = 10 ** (10 ** 8) %}
{{ 1.5 | round(10 ** 9, 'ceil') }}
{{ strftime_now('%999999999Y') }}
{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}
{{ 'a' * 10 ** 10 }}
{{ 10 ** 10 * 'a' }}
{{ [0] * 10 ** 10 }}
{{ (0, 1) * 10 ** 10 }}
{{ 10 ** 10 * [0] }}
{{ '%999999999d' % 1 }}
{{ '%*d' % (999999999, 1) }}
{{ '%.999999999f' % 1.5 }}
{{ '%999999999d' | format(1) }}
{{ '{:>999999999}'.format('a') }}
{{ '{:>{w}}'.format('a', w=999999999) }}
{{ '{a:>999999999}'.format_map({'a': 1}) }}
{{ ('{0}' * 50000).format('a' * 100000) }}
{{ ('%(a)s' * 50000) % {'a': 'a' * 100000} }}
{{ 'a' | center(999999999) }}
{{ 'a'.ljust(999999999) }}
{{ 'a'.zfill(999999999) }}
{{ '\t'.expandtabs(999999999) }}
{{ 'a\nb' | indent(999999999) }}
{{ ('a\n' * 100000) | indent('x' * 100000) }}
{% set ns = namespace(a='aaaa') %}{% for i in range(64) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}
{% set ns = namespace(a='aaaa') %}{% for i in range(64) %}{% set ns.a = ns.a + ns.a %}{% endfor %}
{% set ns = namespace(a=[0]) %}{% for i in range(64) %}{% set ns.a = ns.a + ns.a %}{% endfor %}
{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}aaaa{% endif %}{% endmacro %}{{ f(60) }}
{{ ('a' * 100000) | replace('a', 'b' * 100000) }}
{{ ('a' * 100000).replace('', 'b' * 100000) }}
{{ range(99999) | join('b' * 100000) }}
{{ ('b' * 100000).join(['a'] * 100000) }}
{{ (['b' * 100000] * 99999) | join }}
{{ range(9999) | list | tojson(separators=('x' * 99999, ':')) }}
{{ [[[1]]] | tojson(indent=999999999) }}
{{ ([0] * 10000) | tojson(indent='x' * 99999) }}
{{ ([[0] * 300] * 3000) | sum(start=[]) }}
{{ [1] | slice(999999999) | list }}
{{ [1] | batch(999999999, 'x') | list }}
{{ range(99999) | groupby('real') }}
BIG {{ big | list }}
{{ ('a ' * 999999).split() }}
{{ ('\n' * 999999).splitlines() }}
{{ ('a,' * 999999).split(',') }}
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}
FOREVER {% set x = range(99999) | list %}
FOREVER {% set x = range(99999) | sum %}
FOREVER {% set x = range(99999) | select('odd') | list %}
FOREVER {{ range(9999) | max }}
FOREVER {% set x = range(99999) | map('string') | list %}
{% set a = range(99999) | list %}FOREVER {% set b = a[1:] %}
BIG FOREVER {{ big.count('ba') }}
BIG FOREVER {% if big in big %}{% endif %}
BIG FOREVER {% if big is eq(big ~ '') %}{% endif %}
FOREVER MANY
{% macro f() %}MANY{% endmacro %}FOREVER {{ f() }}
FOREVER {% for j in range(99999) %}{{ loop | max }}{% break %}{% endfor %}
NEST {{ ns.x | tojson }}
NEST {{ ns.x }}
NEST {{ ns.x ~ '' }}
NEST {{ ns.x == ns.y }}
NEST {{ {ns.x: 1} }}
NEST {{ {}[ns.x] }}
NEST {{ [ns.x] | unique | list }}
NEST {{ dict([(ns.x, 1)]) }}
NEST {{ [ns.x].index(ns.y) }}
NEST {{ '%s' % [ns.x] }}
NEST {{ [ns.x] | select('eq', ns.y) | list }}
NEST {{ raise_exception(ns.x) }}
NEST {{ '{}'.format(ns.x) }}
NEST {{ [ns.x, ns.y] | sort }}
NEST {{ [[ns.x]] | join }}
NEST {{ namespace(a=ns.x) }}
NEST {{ {'a': ns.x} | string }}
NEST {{ {'a': ns.x}.items() | list | string }}
NEST {{ {'a': ns.x}.values() ~ '' }}
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}
{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}
{% block a %}{{ self.a() }}{% endblock %}
BIG {{ big }}
FOREVER aaaa
{{ strftime_now('%c' * 100000) }}
""")
BROKEN = listed(r"""
{{ 1 / 0 }}
{{ {}['a']['b'] }}
{{ 1 + 'a' }}
{{ 1e308 * 10 ** 400 }}
{{ (1e308 * 10) | int }}
{{ range(10 ** 9) }}
{% include 'x' %}
{% import 'x' as y %}
{% extends 'x' %}
{{ lipsum() }}
{{ none[1:] }}
{{ '%d' % 'a' }}
{{ ''.join(1) }}
{{ raise_exception('two\nlines') }}
{{ raise_exception('x\n' * 99999) }}
{{ {} | dictsort(by='x') }}
{{ 'a' | center('b') }}
{{ '{'.format() }}
{{ '\ud800' }}
{{ messages[7].content }}
{{ cycler() }}
""")
ESCAPES = listed(r"""
{{ ''.__class__.__mro__ }}
{{ messages.append(1) }}
{{ cycler.__init__.__globals__ }}
{{ namespace.__init__.__globals__ }}
{{ dict.__call__.__globals__ }}
{{ namespace(__class__=1) }}
{% set n = namespace() %}{% set n.__class__ = 1 %}
{{ 5 .to_bytes(10 ** 9, 'big') }}
{{ 'a'.encode() * 10 ** 10 }}
{{ 'a'.translate({97: 'b' * 99999}) }}
{{ messages[0].update(a=1) }}
{{ ('a' | attr('__class__')).b }}
{{ 'a'.format.__self__.b }}
{{ '{0.__class__.__mro__}'.format('a') ~ ''.x.y }}
{{ 'a'.own.b }}
{{ raise_exception.__globals__.b }}
{{ (['a'] | map(attribute='__class__') | list)[0].b }}
""")
UNLOADABLE = [
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "{% if a %}" + "{% elif b %}" * 7000 + "{% endif %}",
    "{{ 1" + " + 1" * 12000 + " }}",
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "{{ " + "9" * 90000 + " }}",
    "{{ a" + ".b" * 12000 + " }}",
    "a" * (MAX_SOURCE + 1),
    *["{% for %}", "{{ a | nothing }}", "{{ a | urlize }}", "{% nothing %}", "{{", "{% generation %}", "{% macro f(a, a) %}{% endmacro %}"],
]


def refusal(source: str) -> str:
    with pytest.raises(UserError) as refused:
        render([{"role": "user", "content": "Hello"}], OURS, None, template=ChatTemplate({"default": source}, NAMED, "DIR"))  # pyright: ignore
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("source", [*BROKEN, *ESCAPES])
def test_every_failure_is_one_line(source):
    """Whatever exception a template makes Python raise, none reaches the user as a traceback; nor does Python's inside."""
    assert refusal(source).startswith(("the chat template refused the conversation: ", "a text holds half a character"))


@pytest.mark.parametrize("source", UNLOADABLE, ids=lambda source: source[:20])
def test_what_cannot_be_compiled_is_one_line(source):
    assert "chat template of DIR" in refusal(source)


def test_cost_is_bounded():
    """Time and memory of hostile templates, all in one process that may take 400 MB more than it has, and a minute in all."""
    program = "import test_untrusted_templates; test_untrusted_templates.run_costly()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(set(COSTLY))
    accepted = {source: outcome for source, outcome in outcomes.items() if "refused the conversation" not in outcome}
    assert not accepted
    assert not {source for source, outcome in outcomes.items() if "MemoryError" in outcome}  # refused before, not when there is no more


def run_costly() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 400_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    print(json.dumps({source: refusal(source) for source in COSTLY}))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ('a' * 20000000) | length }}",
        "{{ ([0] * 2000000) | length }}",
        "{{ 2 ** 30000 > 1 }}",
        "{{ (2 ** 15000 * 2 ** 15000) > 1 }}",
        "{{ ('%20000000d' % 1) | length }}",
        "{{ ('a' | center(10001)) | length }}",
        "{% for i in range(99999) %}{% if 1 %}{% if 2 %}{% endif %}{% endif %}{% endfor %}",
        "{% for i in range(99999) if 0 == 1 + 2 + 3 %}{% endfor %}",
    ],
)
def test_just_beyond_the_budget(source):
    """Harmless sizes, so that a limit that has gone shows at once."""
    refusal(source)


def test_nothing_is_computed_while_compiling():
    """A constant expression is worth nothing yet when a template is loaded: there is no budget then."""
    counted = []
    environment = ChatEnvironment()
    environment.filters["counted"] = counted.append
    for source in (
        "{{ 1 | counted }}",
        "{% set x = 1 | counted %}",
        "{% if (1 | counted) %}{% endif %}",
        "{{ ['a' * (1 | counted or 2)] }}",
    ):
        environment.from_string(source)
    assert counted == []


def test_the_budget_grows_with_the_conversation():
    """A template that walks through everything for each of its messages is no attack, nor are ten long texts."""
    source = """{% set ns = namespace(text='') %}{% for message in messages %}
        {%- for earlier in messages[:loop.index] if earlier.role == 'tool' %}{% endfor %}
        {%- set ns.text = ns.text ~ message.role ~ message.content | trim ~ (message | tojson | length) %}
        {%- endfor %}{{ ns.text }}"""
    template = ChatTemplate({"default": source}, NAMED, "DIR")
    many = [{"role": "user", "content": f"question {i}"} for i in range(300)]
    long = [{"role": "user", "content": "word " * 20000}] * 10
    for messages in (many, long):
        text = template.render(messages, tools=None, add_generation_prompt=True, continued=None)
        assert len(text) > sum(len(message["content"]) for message in messages) - 10
    assert 20 * len(many) ** 2 / 2 > STEPS  # some twenty steps for a look at an earlier message
    assert sum(len(message["content"]) for message in long) > 4 * OUTPUT


def test_what_transformers_gives_a_template():
    """Tags, filters and functions that Jinja itself lacks."""
    sources = {
        "{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x is defined }}": "aFalse",
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}": "02",
        "{{ {'b': 'é<', 'a': [1]} | tojson }}": '{"b": "é<", "a": [1]}',
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}": '{"a":1,"b":"\\u00e9"}',
        "{{ {'b': 1} | tojson(indent=2) }}": '{\n  "b": 1\n}',
        "{{ strftime_now('%Y') }}": str(datetime.now().year),
        "{{ dict(a=1).a }}{{ dict.fromkeys(['a'], 2) }}": "1{'a': 2}",
        "{{ 'a\nb' | indent }}{{ 'a\n\nb' | indent(2, true, true) }}": "a\n    b  a\n  \n  b",
        "{{ [1, 2] | sum }}{{ [[1], [2]] | sum(start=[]) }}": "3[1, 2]",
        "  {% if true %}\n  x\n  {% endif %}\ny\n": "  x\ny",
        "{{ '%s is %d' % ('a', 1700000000) }}{{ '{:>4}{}'.format('a', 1700000000) }}": "a is 1700000000   a1700000000",
        "{{ 1700000000 | default(2) }}{{ none | default(1700000000, true) }}": "17000000001700000000",
    }
    for source, expected in sources.items():
        template = ChatTemplate({"default": source}, NAMED, "DIR")
        assert template.render([{"role": "user"}], tools=None, add_generation_prompt=True, continued=None) == expected, source


def test_a_template_that_is_too_large_is_not_read(tmp_path):
    """A file of the size of weights must not be loaded to find that it is no template."""
    with open(tmp_path / "chat_template.jinja", "wb") as file:
        file.truncate(10**11)
    with pytest.raises(UserError, match=r"chat_template.jinja has more than"):
        load_template(tmp_path)
