"""Chat templates of strangers: they render as transformers renders them, and end in any case."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from pathlib import Path

import jinja2
import pytest

from parallax.scheduler.text.template import FAILURES, ChatTemplate
from tests.models import make_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&</b> 你好 'x'"},
    {"role": "assistant", "content": "<think>\nwhy\n</think>\nYes.", "reasoning_content": "why"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, 2]}}}
        ],
    },
    {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
    {"role": "user", "content": "And?"},
]

# What the templates of well-known models do, each in a line or a few of our own.
HONEST = {
    "roles": "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "loop": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{{ loop.index0 }}"
    "{{ m.content }}{% if not loop.last %}, {{ loop.revindex }}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, text='') %}{% for m in messages[::-1] %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ m.role ~ ns.n %}{% endfor %}{{ ns.text }}",
    "filters": "{{ messages | map(attribute='role') | unique | join('/') | upper }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ messages | tojson(indent=2) }}{{ messages | rejectattr('name', 'defined') | list | count }}"
    "{{ 'a\\nb' | indent(4) }}{{ 'aXb' | replace('X', '--') }}{{ none | default('d', true) }}",
    "defaults": "{% set think = think | default(true) %}{{ think }}{{ tag | default('x') ~ tag }}"
    "{{ tag | d(none) is none }}{{ tag | upper }}{{ tag is iterable }}{{ tag | list }}"
    "{% if (messages[0].n | default(true)) == true and not tag | length %}yes{% endif %}",
    "once": "{% set u = messages | selectattr('role', 'equalto', 'user') %}{{ u is sequence }}"
    "{% for m in u %}{{ m.content }}{{ loop.last }}{% endfor %}{% for m in u %}?{% endfor %}"
    "{% if messages | selectattr('role', 'equalto', 'nobody') %}true{% endif %}"
    "{% set roles = messages | map(attribute='role') | list %}{{ roles == ['user'] }}"
    "{{ ', '.join(messages | map(attribute='role')) }}{{ 'user' in roles | reject('eq', 'tool') }}"
    "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | first }}",
    "strings": "{% for m in messages if m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{{ m.content.startswith('<') }}{{ m.content.replace('\n', ' ').upper() }}"
    "{{ '%s-%d' % (m.role, 3) }}{{ '{} {}'.format(m.role, 1) }}{% else %}none{% endfor %}",
    "macro": "{% macro show(m, tag='x') -%}<{{ tag }}>{{ m.content }}{%- endmacro %}"
    "{% for m in messages %}{{ show(m) }}{{ show(m, tag=m.role) }}{% endfor %}",
    "arguments": "{% for m in messages if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson if v is sequence else v }}"
    "{% endfor %}{{ c.function | dictsort }}{% endfor %}{% endfor %}",
    "control": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}{% set x %}block {{ eos_token }}{% endset %}{{ x | trim }}"
    "{% generation %}said{% endgeneration %}{% filter upper %}loud{% endfilter %}",
    "tests": "{{ messages is iterable }}{{ messages[0] is mapping }}{{ messages[0].x is defined }}"
    "{{ 'a' in 'cat' and 2 not in [1] }}{{ messages[1].content is string }}{{ 3 // 2 + 2 ** 5 }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}{{ m.reasoning_content }}{% endfor %}",
    "formats": "{{ '%-5s|%05.1f%%|%x' % ('a', 2, 255) }}"
    "{{ '%(a)s %(b)d' % {'a': messages[1].content, 'b': 3000} }}{{ 'from 2024: {:>5}|{a!r}' "
    ".format(1, a='x') }}{{ '{:.2f} {:,}'.format(1.5, 99999) }}{{ '{a}'.format_map({'a': none}) }}",
    "numbers": "{{ 2.567 | round(1) }}{{ 7 | round(-1) }}{{ 2.1 | round(0, 'ceil') | int }}"
    "{{ 7 - 2.5 }}{{ [1, 2] | sum }}{{ messages | map(attribute='n', default=1) | sum }}",
    "shown": "{{ messages[3].tool_calls }}{{ [1, 'é\n', none] ~ 1.5 }}{{ {'a': true} | string }}"
    "{{ messages[0].items() | list }}{{ 'b' in messages[0] or 'content' in messages[0] }}",
    "pieces": "{{ 'a b  c'.split() }}{{ 'a-b-c'.rsplit('-', 1) }}{{ 'a\nb'.splitlines() }}"
    "{{ 'xaxx'.rstrip('x').rfind('a') }}{{ ', '.join(['a', 'b']) }}{{ 'a.b'.partition('.')[2] }}"
    "{{ ', '.join(messages[0].values()) }}{{ 'tEXT here' | title }}{{ 'straße'.upper() }}",
}

LARGE = "{% set x = 'a' * 10000000 %}"

HOSTILE = {
    "loops for ever": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that skip": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}"
    "{% endfor %}",
    "ten gigabytes": "{{ 'x' * 10 ** 10 }}",
    "ten gigabytes of a list": "{{ [1] * 10 ** 10 }}",
    "ten gigabytes by doubling": "{% set ns = namespace(x='x') %}{% for i in range(40) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "nested twice each time": "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "a key of tuples": "{% set ns = namespace(x=1) %}{% for i in range(64) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "padding": "{{ '%9999999999d' % 1 }}",
    "padding by format": "{{ '{:>9999999999}'.format(1) }}",
    "padding by an argument": "{{ '{:>{}}'.format(1, 9999999999) }}",
    "padding by method": "{{ 'x'.ljust(9999999999) }}",
    "padding by filter": "{{ 'x' | indent(9999999999, true) }}",
    "padding of JSON": "{{ [1] | tojson(indent=9999999999) }}",
    "replacing": "{{ ('x' * 10000).replace('', 'y' * 100000) }}",
    "replacing by filter": "{{ ('x' * 10000) | replace('x', 'y' * 100000) }}",
    "joining": "{{ ('x' * 100000).join(('y' * 100000) | list) }}",
    "joining by filter": "{{ ('y' * 100000) | join('x' * 100000) }}",
    "huge numbers": "{% set ns = namespace(x=10) %}{% for i in range(64) %}"
    "{% set ns.x = ns.x ** 99 %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n < 60 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}"
    "{% endmacro %}{{ f(0) }}",
    "recursion without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "written often": "{% for i in range(99999) %}" + 10_000 * "text " + "{% endfor %}",
    "comparing": "{% set x = 'a' * 3000000 %}{% set y = x ~ 'b' %}{% set z = x ~ 'c' %}"
    "{% for i in range(99999) %}{{ y == z }}{% endfor %}",
    "sorting": "{% set x = 'a' * 3000000 %}{{ ([x ~ 'b', x ~ 'c'] * 1000) | sort | length }}",
    "lipsum": "{{ lipsum(n=99999) }}",
    "the class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals": "{{ raise_exception.__globals__['os'] }}",
    "the filter of attributes": "{{ '' | attr('__class__') }}",
    "changing the messages": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "parentheses": "{{ " + "(" * 20_000 + ")" * 20_000 + " }}",
    "a long number": "{{ " + "9" * 20_000 + " }}",
    "a date that pads": "{{ strftime_now('%999999999d') }}",
    "no Jinja": "{% for %}",
    "a format of many fields": LARGE + "{% set y = ('%(a)s' * 100) % {'a': x} %}",
    "a format method of many fields": LARGE + "{% set y = ('{0}' * 100).format(x) %}",
    "a format map of many fields": LARGE + "{% set y = ('{a}' * 100).format_map({'a': x}) %}",
    "a format that reaches in": LARGE + "{% set n = namespace(a=x) %}"
    "{% set y = ('{0.a}' * 100).format(n) %}",
    "a width of three digits": "{{ '%(a)999d' % {'a': 1} }}",
    "a precision of three digits": "{{ '{:.999f}'.format(1.5) }}",
    "widths of two digits": "{% set y = ('%(a)99d' * 190000) % {'a': 1} %}",
    "escapes": "{% set y = ['\U000e0001' * 20000000] | string %}",
    "escapes of JSON": "{% set y = ('\x00' * 31000000) | tojson %}",
    "separators of JSON": "{% set y = ([1] * 9000) | tojson(separators=('x' * 90000, ':')) %}",
    "joining a list that is written down": LARGE + "{% set y = ''.join([" + 100 * "x, " + "]) %}",
    "joining a dictionary": LARGE
    + "{% set y = ''.join({"
    + ", ".join(f"{i}: x" for i in range(100))
    + "}.values()) %}",
    "an error of many texts": LARGE + "{{ raise_exception([" + 100 * "x, " + "]) }}",
    "rounding": "{{ 5 | round(-100000) }}",
    "rounding up": "{{ 5 | round(100000, 'floor') }}",
    "splitting": "{% set y = ('ab ' * 4000000).split(' ') %}",
    "splitting at blanks": "{% set y = ('ab ' * 10000000).split() %}",
    "splitting lines": "{% set y = ('ab\r' * 10000000).splitlines() %}",
    "a list of characters": "{% set y = ('你' * 5000000) | list %}",
    "unpacking": "{{ 'a'.startswith(*('你' * 5000000)) }}",
    "searching backwards": "{{ ('a' * 100000).rfind('a' * 5000 ~ 'b' ~ 'a' * 5000) }}",
    "stripping": "{{ ('x' * 70000).strip('y' * 70000 ~ 'x') }}",
    "trimming": "{{ ('x' * 70000) | trim('y' * 70000 ~ 'x') }}",
    "indenting lines": "{% set y = ('a\r' * 10000000) | indent(60) %}",
    "titles": "{% set y = ('a-' * 1000000) | title %}",
    "long attributes": "{% set y = ['aaa'] | map(attribute='0.' * 100000 ~ '0') | list %}",
    "adding lists up": "{% set y = ([{'a': [1]}] * 9000) | sum(attribute='a', start=[]) %}",
    "subtracting": "{% set y = dict(a=1).keys() - dict(b=1).keys() %}",
    "attributes of namespaces": LARGE + "{% set n = namespace(a=x) %}"
    "{% set y = ([n] * 100) | join(attribute='a') %}",
    "attributes of loops": "{% for i in ['a' * 1000000, 2] %}{% set n = loop %}"
    "{% set y = [loop] | join(attribute='previtem') %}{% endfor %}",
    "reversing": LARGE + "{% for i in range(100) %}{% set y = x | reverse %}{% endfor %}",
    "counting equals": LARGE + "{% set y = [x ~ 'b', x ~ 'b'].count(x ~ 'c') %}",
    "a key of tuples, built first": "{% set ns = namespace(x=1) %}{% for i in range(64) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {1: 1}.get(ns.x) }}",
    "an attribute of tuples": "{% set ns = namespace(x=1) %}{% for i in range(64) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ [{1: 1}] | map(attribute=ns.x) | list }}",
    "an item of tuples": "{% set ns = namespace(x=1) %}{% for i in range(64) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {1: 1}[ns.x] }}",
    "an error that says all": "{{ [1].index('\U000e0001' * 20000000) }}",
    "a key that is not there": "{{ messages['\U000e0001' * 20000000].x }}",
    "namespaces of long lists": "{% set pairs = ['ab', 'cd'] * 20000 %}"
    "{% for i in range(99999) %}{% set n = namespace(pairs) %}{% endfor %}",
    "unpacking for a macro": "{% macro f() %}{{ varargs | length }}{% endmacro %}"
    "{% set all = [1] * 60000 %}{% for i in range(99999) %}{% set y = f(*all) %}{% endfor %}",
    "many conditions": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% if not i is defined %}"
    + "{% elif not i is defined %}" * 1500
    + "{% endif %}{% endfor %}{% endfor %}",
    "hashing": "{% set t = (1,) * 50000 %}{% for i in range(99) %}{{ {1: 1}[t] }}{% endfor %}",
    "a large prompt": "{{ 'a' * 1000000 }}",
    "a block": "{% block a %}{% endblock %}",
    "a template of many characters": "{{ a }}" * 20_000,
    "a template of many parts": "{{a}}" * 9_000,
    "many parts in many loops": "{% for a in b %}" * 15 + "{{a}}" * 4_000 + "{% endfor %}" * 15,
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_render_as_transformers_renders_them(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    make_tokenizer(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    reference.chat_template = HONEST[name]
    expected = reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(HONEST[name]).render(CHAT, reference.special_tokens_map) == expected
    assert expected


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_soon_and_in_little_memory(name):
    _forget_peak()
    peak, began = _peak_bytes(), time.process_time()
    with pytest.raises(FAILURES):
        ChatTemplate(HOSTILE[name]).render(CHAT, {})
    assert time.process_time() - began < 10  # on a slow machine; mostly a tenth of a second
    assert _peak_bytes() - peak < 200 << 20


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak is that of all tests
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    with contextlib.suppress(OSError):
        facts = Path("/proc/self/status").read_text()
        return 1024 * int(facts.split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_long_chat_is_within_the_bound_of_any_honest_template():
    chat = [{"role": "user", "content": "word " * 40}, CHAT[2]] * 2000
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    shown = {name: ChatTemplate(source).render(chat, tokens) for name, source in HONEST.items()}
    assert shown["roles"].count("word") == 40 * 2000


def test_looking_at_a_whole_chat_for_each_message_is_not_paid_for_by_what_the_messages_hold():
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {str(i): i for i in range(99)}},
    }
    chat = [{"role": "user", "content": "Hi"}, {**CHAT[3], "tool_calls": [call]}] * 150
    source = "{% macro show(all, m) %}{{ m.get('role') }}{{ all | length }}{% endmacro %}"
    source += "{% for m in messages[::-1] %}{% set i = messages | length - 1 - loop.index0 %}"
    source += "{% set before = messages[:i] %}{% set state = [m, before] %}"
    source += (
        "{{ show(messages, m) }}{{ (messages | first).role }}{{ before | length }}{% endfor %}"
    )
    shown = ChatTemplate(source).render(chat, {})
    assert shown.count("user300") == 150


def test_a_template_may_look_back_from_each_message_and_at_each_character():
    looks_back = "{% for m in messages %}{% for i in range(loop.index0, -1, -1) %}"
    looks_back += "{% if messages[i].role == 'tool' %}{% endif %}{% endfor %}{% endfor %}"
    parts = "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}picture"
    parts += "{% endif %}{% endfor %}{{ m.role }}{% endfor %}"
    chat = [{"role": "user", "content": ""}]
    assert ChatTemplate(looks_back).render(chat * 600, {}) == ""
    assert ChatTemplate(parts).render([{**chat[0], "content": "a" * 80_000}], {}) == "user"


def test_however_many_messages_come_a_template_ends_soon():
    source = "{% for i in range(24) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    chat = [{"role": "user", "content": ""}] * 16_000
    with pytest.raises(jinja2.TemplateError, match="too much work"):
        ChatTemplate(source + "{{ raise_exception('so far') }}").render(chat, {})


def test_what_one_chat_used_up_is_there_again_for_the_next():
    template = ChatTemplate(
        "{% for m in messages %}{% for i in range(20000) %}{% endfor %}{% endfor %}"
    )
    for _ in range(20):
        assert template.render(CHAT, {}) == ""


def test_a_template_that_is_refused_says_why():
    with pytest.raises(jinja2.TemplateError, match="only users"):
        ChatTemplate("{{ raise_exception('only users') }}").render(CHAT, {})
    with pytest.raises(jinja2.TemplateError, match="too much"):
        ChatTemplate("{{ 'x' * 10 ** 10 }}").render(CHAT, {})


def test_a_template_that_adds_arguments_of_calls_to_a_text_gets_them_as_text():
    source = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    source += "{{ c.function.name + ': ' + c.function.arguments }}{% endfor %}{% endfor %}"
    assert ChatTemplate(source).render(CHAT, {}) == 'f: {"a": [1, 2]}'
    with pytest.raises(TypeError):
        ChatTemplate(source + "{{ 'a' + 1 }}").render(CHAT, {})


def test_a_template_larger_than_any_known_one_is_taken():
    source = "".join(HONEST.values())
    source *= 30_000 // len(source)
    shown = ChatTemplate(source).render(CHAT, {"bos_token": "<s>"})
    assert shown.count("Hi <b>") > 20


def test_a_namespace_has_no_text_however_many_others_it_holds():
    source = "{% set o = namespace(x=1) %}{% for i in range(18) %}"
    source += "{% set o.x = namespace(a=o.x, b=o.x) %}{% endfor %}{{ o.x }}"
    assert ChatTemplate(source).render(CHAT, {}) == "<Namespace>"
