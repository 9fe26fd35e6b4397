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
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from parallax.scheduler.text.allowed import COMPARING, FILTERS, METHODS, PEEKING, STATEMENTS
from parallax.scheduler.text.budget import BUDGET, ONCE, Budget, TooMuch
from parallax.scheduler.text.prices import (
    pay_for_filter,
    pay_for_format,
    pay_for_method,
    pay_for_percent,
    pay_for_power,
    pay_for_product,
    pay_for_sum,
)

CALL_STEPS = 4  # a call takes about as long as so many turns of a loop
NODES_EACH_STEP = 32  # of a loop's body or a macro's: names, conditions and constants cost little
MOST_NODES = 8_000  # of a parsed template; one of 17,000 characters has some 1,500
MOST_NESTED = 40_000  # the same, each counted once more for every loop and branch around it


def render(template: jinja2.Template, budget: Budget, values: dict[str, Any], most: int) -> str:
    """What a template of :class:`CountedEnvironment` makes of these values.

    ``most``: characters that may come of it in the end.

    Raises:
        jinja2.TemplateError: it refuses them, or is over its budget.
        TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError:
            it fails on them.
    """
    token = BUDGET.set(budget)
    try:
        pieces, left = [], most
        for piece in template.generate(values):
            budget.spend(1, len(piece))
            left -= len(piece)
            if left < 0:
                raise TooMuch("it makes a prompt that is far longer than the messages")
            pieces.append(piece)
        return "".join(pieces)
    finally:
        BUDGET.reset(token)


class _Counting(NodeTransformer):
    """Puts the counting filters around whatever may be repeated or may grow."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        turn, test = _tick_for(node.body), _tick_for([] if node.test is None else [node.test])
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(turn))
        if node.test is not None:
            node.test = nodes.And(test, node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        turn = _tick_for(node.body)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(turn))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        written = sum(len(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        shown: list[nodes.Expr] = [
            child if isinstance(child, nodes.TemplateData) else _filter(child, "parallax_shown")
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
            sought = operand.op in ("in", "notin")
            operand.expr = _filter(operand.expr, "parallax_sought" if sought else "parallax_read")
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        loads = getattr(node, "ctx", "load") == "load"
        return _filter(node, "parallax_look") if loads else node

    visit_List = visit_Tuple = _made

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        for pair in node.items:
            pair.key = self._hashed(pair.key)
        return self._made(node)

    @staticmethod
    def _hashed(node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else _filter(node, "parallax_hashed")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, "parallax_look")
        node.arg = self._hashed(node.arg)
        return node

    def _given(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            if (value := getattr(node, name)) is not None:
                setattr(node, name, _filter(value, "parallax_unpacked"))
        return node

    visit_Call = visit_Filter = visit_Test = _given

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not for chats", node.lineno)


_SCOPES = (nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With)


def _check_size(tree: nodes.Template) -> None:
    """Compiling takes long for many nodes, and longer for those in many branches and loops."""
    count = nested = 0
    waiting: list[tuple[nodes.Node, int]] = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        nested += depth
        if count > MOST_NODES or nested > MOST_NESTED:
            raise jinja2.TemplateSyntaxError("a template of very many parts", node.lineno)
        if type(node).__name__ in STATEMENTS:
            name = type(node).__name__.lower()
            raise jinja2.TemplateSyntaxError(f"{name} is not for chats", node.lineno)
        depth += isinstance(node, _SCOPES)
        waiting += [(child, depth) for child in node.iter_child_nodes()]


def _tick_for(parts: Iterable[nodes.Node]) -> nodes.Filter:
    """What one turn through these parts costs, beside what is counted in it."""
    waiting, count = list(parts), 0
    while waiting:
        node = waiting.pop()
        count += 3 if isinstance(node, (nodes.Getattr, nodes.Getitem)) else 1
        waiting += node.iter_child_nodes()
    return _filter(nodes.Const(1 + count // NODES_EACH_STEP), "parallax_tick")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _PlainNamespace(Namespace):
    """``namespace()``, without names that begin with an underscore, and without a text."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        BUDGET.get().spend()
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it may hold itself, or another one twice, which holds ...


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

    intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

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
            "parallax_shown": _shown,
            "parallax_sought": _sought,
            "parallax_unpacked": _unpacked,
            "parallax_hashed": _hashed,
            "parallax_look": _look,
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
        tree = super()._parse(source, name, filename)
        _check_size(tree)
        counted: nodes.Template = _Counting().visit(tree)
        return counted

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``+ - * ** %``, paid first where they can make much of little."""
        if operator == "*":
            pay_for_product(BUDGET.get(), left, right)
        elif operator == "**":
            pay_for_power(left, right)
        elif operator == "+":
            pay_for_sum(BUDGET.get(), left, right)
        elif operator == "%" and isinstance(left, str):
            pay_for_percent(BUDGET.get(), left, right)
        elif operator == "-" and not isinstance(left, (int, float)):
            raise TypeError("- is for numbers")
        result = self.binop_table[operator](left, right)
        if type(result) is not str:
            BUDGET.get().glance(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map``, sandboxed, and paid first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form: str = value.__self__
        mapped = value.__name__ == "format_map"

        def paid(*args: Any, **kwargs: Any) -> str:
            whole = mapped and len(args) == 1 and isinstance(args[0], Mapping)
            parts = args[0].values() if whole else (*args, *kwargs.values())
            pay_for_format(BUDGET.get(), form, tuple(parts))
            return wrapped(*args, **kwargs)

        return paid

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A call of a macro, of one of ours, or of a method of :data:`METHODS`."""
        budget = BUDGET.get()
        budget.spend(CALL_STEPS)
        # A macro pays for itself what it does with them; what Python does is paid here.
        if isinstance(__obj, type):
            for value in args:  # of which a namespace is made
                budget.look(value, deep=False)
        elif not isinstance(__obj, (Macro, LoopContext)):
            args = tuple(_rows(value, budget) for value in args)
            for value in (*args, *kwargs.values()):
                budget.look(value, deep=True)
        if isinstance(__obj, (types.BuiltinMethodType, types.MethodWrapperType)):
            owner = __obj.__self__
            if __obj.__name__ not in METHODS.get(type(owner), ()):
                raise SecurityError(f"{__obj.__name__} is not for chat templates")
            pay_for_method(budget, owner, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.glance(result)
        return result


@pass_context
def _tick(_context: Context, steps: int) -> bool:
    BUDGET.get().spend(steps)
    return True


@pass_context
def _read(_context: Context, value: Any) -> Any:
    BUDGET.get().look(value, deep=True)
    return value


@pass_context
def _shown(_context: Context, value: Any) -> Any:
    BUDGET.get().shown(value)
    return value


@pass_context
def _sought(_context: Context, value: Any) -> Any:
    """What something is sought in: a dictionary is not gone through for it."""
    value = _rows(value, BUDGET.get())
    if isinstance(value, str):
        BUDGET.get().spend(1, 4 * len(value))
    elif isinstance(value, dict):
        BUDGET.get().spend()
    else:
        BUDGET.get().look(value, deep=True)
    return value


@pass_context
def _unpacked(_context: Context, value: Any) -> Any:
    value = _rows(value, BUDGET.get())
    if not isinstance(value, (list, tuple, dict)):
        raise SecurityError("arguments are unpacked of lists and dictionaries alone")
    BUDGET.get().glance(value)
    return value


@pass_context
def _hashed(_context: Context, value: Any) -> Any:
    """A key, of which all is hashed, and said where there is no such one."""
    if isinstance(value, (str, tuple)):
        BUDGET.get().written_out(value)
    return value


@pass_context
def _look(_context: Context, value: Any) -> Any:
    BUDGET.get().glance(value)
    return value


@pass_context
def _written(_context: Context, characters: int) -> str:
    BUDGET.get().spend(1, characters)
    return ""


@pass_context
def _concat(_context: Context, values: list[Any]) -> str:
    budget = BUDGET.get()
    for value in values:
        budget.shown(value)
    return "".join(map(str, values))


def _counted_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    kind = getattr(call, "jinja_pass_arg", None)
    kind = getattr(kind, "name", None)

    @pass_context
    def counted(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        # What is undefined could be gone through, too, but is not a list for that.
        if (
            isinstance(value, Iterable)
            and not isinstance(value, _KEPT)
            and name not in _GIVING_BACK
        ):
            value = list(_paid(value, budget))
        pay_for_filter(budget, name, value, args, kwargs)
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(str(kind), ())
        result = call(*first, value, *args, **kwargs)
        if isinstance(result, Iterator) and name not in PEEKING:
            return iter(
                list(_paid(result, budget))
            )  # templates ask whether it is true, or has length
        budget.glance(result)
        return result

    return counted


_KEPT = (str, dict, list, tuple, Undefined)
_GIVING_BACK = frozenset(("d", "default", "first", "safe"))


def _rows(value: Any, budget: Budget) -> Any:
    return list(_paid(value, budget)) if isinstance(value, ONCE) else value


def _paid(items: Iterable[Any], budget: Budget) -> Iterator[Any]:
    for item in items:
        budget.spend()
        yield item


def _counted_test(call: Callable[..., Any]) -> Callable[..., Any]:
    @pass_context
    def counted(_context: Context, *args: Any) -> Any:
        for value in args:
            BUDGET.get().look(value, deep=True)
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
    BUDGET.get().shown(message)
    raise jinja2.TemplateError(str(message)[:500])


def _now(form: str) -> str:
    if len(form) > 64 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise SecurityError("a date that pads")
    return datetime.now().strftime(form)
