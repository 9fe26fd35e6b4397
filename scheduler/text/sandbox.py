"""A Jinja environment for templates of strangers: nothing reachable, and all work counted.

Jinja's own sandbox keeps templates away from Python's insides, but lets them loop for ever and make
gigabytes. Here a template is rewritten before it is compiled: every turn of a loop, call, filter,
operator and piece of output pays from a :class:`Budget`, by the size of what it looks at or makes.
What could make much out of little (repetition, padding, joins) is priced before it is done, and
what no chat template needs is not there. So a bound holds that depends on the machine in nothing.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from parallax.scheduler.text.allowed import (
    COMPARING,
    FILTERS,
    METHODS,
    SHALLOW,
    price_of_filter,
    price_of_method,
)

MOST_INTEGER_BITS = 4096
CALL_STEPS = 4  # a call takes about as long as so many turns of a loop
_WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # a width that pads, in either of Python's formats


class TooMuch(jinja2.TemplateError):
    """A template wants to do or make more than a chat is worth."""


class Budget:
    """What one rendering may still do: steps (turns, calls, elements) and characters."""

    __slots__ = ("characters", "steps")

    def __init__(self, steps: int, characters: int) -> None:
        self.steps = steps
        self.characters = characters

    def spend(self, steps: int = 1, characters: int = 0) -> None:
        """Pays, or raises :class:`TooMuch`."""
        self.steps -= steps
        self.characters -= characters
        if self.steps < 0 or self.characters < 0:
            raise TooMuch("it does too much work for these messages")

    def look(self, value: object, *, deep: bool) -> None:
        """Pays for walking through a value; ``deep``: for reading its strings as well."""
        if isinstance(value, str):
            self.spend(1, len(value) if deep else 0)
        elif isinstance(value, dict):
            self.spend(1 + len(value))
            for key, item in value.items():
                self.look(key, deep=deep)
                self.look(item, deep=deep)
        elif isinstance(value, (list, tuple, set, frozenset)):
            self.spend(1 + len(value))
            for item in value:
                self.look(item, deep=deep)
        elif isinstance(value, int) and value.bit_length() > MOST_INTEGER_BITS:
            raise TooMuch("it makes huge numbers")


_BUDGET: ContextVar[Budget] = ContextVar("budget")


def render(template: jinja2.Template, budget: Budget, values: dict[str, Any]) -> str:
    """What a template of :class:`CountedEnvironment` makes of these values.

    Raises:
        jinja2.TemplateError: it refuses them, or is over its budget.
        TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError:
            it fails on them.
    """
    token = _BUDGET.set(budget)
    try:
        pieces = []
        for piece in template.generate(values):
            budget.spend(1, len(piece))
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _BUDGET.reset(token)


class _Counting(NodeTransformer):
    """Puts the counting filters around whatever may be repeated or may grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = _filter(nodes.Const(None), "parallax_tick")
        node.body.insert(0, nodes.ExprStmt(tick))
        if node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(None), "parallax_tick"), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), "parallax_tick")))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        written = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        shown: list[nodes.Expr] = [
            child if isinstance(child, nodes.TemplateData) else _filter(child, "parallax_read")
            for child in node.nodes
        ]
        if written:
            shown.append(_filter(nodes.Const(written), "parallax_written"))
        node.nodes = shown
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "parallax_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "parallax_read")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "parallax_read")
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        loads = getattr(node, "ctx", "load") == "load"
        return _filter(node, "parallax_look") if loads else node

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "parallax_sliced") if isinstance(node.arg, nodes.Slice) else node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not for chats", node.lineno)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _PlainNamespace(Namespace):
    """``namespace()``, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        _BUDGET.get().look(value, deep=False)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name like {name[:40]!r}")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant said, for training; here it says nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class CountedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face's chat templates expect it, with all work counted."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, jinja2.ext.loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        own = {name: self.filters[name] for name in FILTERS if name in self.filters}
        own["tojson"] = _tojson
        own["safe"] = lambda value: value
        self.filters = {name: _counted_filter(name, call) for name, call in own.items()}
        self.filters |= {
            "parallax_tick": _tick,
            "parallax_read": _read,
            "parallax_look": _look,
            "parallax_sliced": _look,
            "parallax_written": _written,
            "parallax_concat": _concat,
        }
        self.tests = {
            name: _counted_test(cast(Callable[..., Any], call)) if name in COMPARING else call
            for name, call in self.tests.items()
            if name not in ("filter", "test")
        }
        safe_range = self.globals["range"]
        self.globals = {
            "range": safe_range,
            "dict": _dict,
            "namespace": _PlainNamespace,
            "raise_exception": _raise,
            "strftime_now": _now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``+ * ** %``, priced first where they can make much of little."""
        budget = _BUDGET.get()
        if operator == "*":
            _price_product(budget, left, right)
        elif operator == "**":
            _price_power(left, right)
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a format that pads")
        result = self.binop_table[operator](left, right)
        budget.look(result, deep=True)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format``, sandboxed, and without widths that pad."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE.search(value.__self__):
            raise SecurityError("a format that pads")
        return wrapped

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A call of a macro, of one of ours, or of a method of :data:`METHODS`."""
        budget = _BUDGET.get()
        budget.spend(CALL_STEPS)
        for value in (*args, *kwargs.values()):
            budget.look(value, deep=False)
        if isinstance(__obj, (types.BuiltinMethodType, types.MethodWrapperType)):
            owner = __obj.__self__
            if __obj.__name__ not in METHODS.get(type(owner), ()):
                raise SecurityError(f"{__obj.__name__} is not for chat templates")
            budget.look(owner, deep=isinstance(owner, str))
            budget.spend(1, price_of_method(owner, __obj.__name__, args))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.look(result, deep=True)
        return result


def _price_product(budget: Budget, left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__"):
            budget.spend(1, max(0, one) * len(other))
            if not isinstance(other, str):
                budget.spend(max(0, one) * len(other))
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and left.bit_length() + right.bit_length() > MOST_INTEGER_BITS:
        raise TooMuch("it makes huge numbers")


def _price_power(left: Any, right: Any) -> None:
    whole = isinstance(left, int) and isinstance(right, int)
    if whole and left.bit_length() * abs(right) > MOST_INTEGER_BITS:
        raise TooMuch("it makes huge numbers")


@pass_context
def _tick(_context: Context, _value: object) -> bool:
    _BUDGET.get().spend()
    return True


@pass_context
def _read(_context: Context, value: Any) -> Any:
    _BUDGET.get().look(value, deep=True)
    return value


@pass_context
def _look(_context: Context, value: Any) -> Any:
    _BUDGET.get().look(value, deep=isinstance(value, str))
    return value


@pass_context
def _written(_context: Context, characters: int) -> str:
    _BUDGET.get().spend(1, characters)
    return ""


@pass_context
def _concat(_context: Context, values: list[Any]) -> str:
    budget = _BUDGET.get()
    budget.look(values, deep=True)
    return "".join(map(str, values))


def _counted_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    kind = getattr(call, "jinja_pass_arg", None)
    kind = getattr(kind, "name", None)

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        if isinstance(value, Iterable) and not isinstance(value, (str, dict, list, tuple)):
            value = list(_paid(value, budget))
        deep = name not in SHALLOW
        budget.look((value, args, kwargs), deep=deep)
        budget.spend(1, price_of_filter(name, value, args, kwargs))
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(str(kind), ())
        result = call(*first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            result = list(_paid(result, budget))
        budget.look(result, deep=deep)
        return result

    return counted


def _paid(items: Iterable[Any], budget: Budget) -> Iterator[Any]:
    for item in items:
        budget.spend()
        yield item


def _counted_test(call: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def counted(_context: Context, *args: Any) -> Any:
        _BUDGET.get().look(args, deep=True)
        return call(*args)

    return counted


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without escapes for HTML: what Hugging Face's templates are written for."""
    if isinstance(value, Undefined):
        raise TypeError("Undefined is not JSON serializable")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message)[:500])


def _now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise SecurityError("a date that pads")
    return datetime.now().strftime(form)
