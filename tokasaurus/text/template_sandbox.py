"""The sandbox of chat templates, with limits of memory and time.

A template is a program, and Jinja's sandbox bounds neither the texts that it makes nor the time
that it takes. So calls of a ``Meter`` are inserted where a text can become long:

- output, and each turn of a loop, macro or block;
- the operators ``+``, ``~``, ``*``, ``%`` and ``**``;
- filters, and the methods of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import update_wrapper, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokasaurus.text.template_meter import GROWING, Meter

__all__ = ["Sandbox"]

# Filters of our own, which Jinja calls with the least effort. No template can name them.
_TURN, _SUM, _JOINED = "turn()", "+", "~"

_CHARGED_FILTERS = (
    *("batch", "center", "dictsort", "e", "escape", "filesizeformat", "forceescape", "format"),
    *("groupby", "indent", "join", "list", "pprint", "replace", "round", "slice", "sort", "string"),
    *("sum", "tojson", "truncate", "unique", "urlencode", "urlize", "wordwrap", "xmlattr"),
)
_SIZED = (str, bytes, list, tuple, dict, set)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template, which runs in one thread at a time.

    Args:
        source: of the template.
        filters: beside Jinja's own, or in their place.
        variables: for every template, beside Jinja's own or in their place.
        meter: charged for everything.

    Attributes:
        template: compiled.

    Raises:
        TemplateError: the source is wrong, or what it computes beforehand is too much.
    """

    intercepted_binops = frozenset({"*", "%", "**"})

    def __init__(
        self,
        source: str,
        filters: Mapping[str, Callable[..., Any]],
        variables: Mapping[str, Any],
        meter: Meter,
    ) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=meter.written,
            optimized=False,
        )
        self._meter = meter
        self.filters.update(filters)
        for name in _CHARGED_FILTERS:
            self.filters[name] = _charged(name, self.filters[name], meter)
        self.filters.update({_TURN: meter.turn, _SUM: meter.sum, _JOINED: meter.joined})
        self.globals.update(variables)
        del self.globals["lipsum"]  # any number of random words
        meter.start()  # some constant expressions are computed here
        tree = self.parse(source)
        meter.builds_lists = _builds_lists(tree)
        _insert_turns(tree)
        _replace_operators(tree)
        tree.set_environment(self)
        self.template: Template = self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._meter.charge_operator(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"{__obj!r} is not safely callable")
        text = getattr(__obj, "__self__", None)
        if isinstance(text, (str, bytes)):
            name, meter = __obj.__name__, __self._meter
            meter.spend(len(text))
            if name == "join":
                args = tuple(each if isinstance(each, _SIZED) else list(each) for each in args)
            if name in GROWING:
                meter.charge_method(text, name, (*args, *kwargs.values()))
        return __context.call(__obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template, write, meter = value.__self__, wrapped, self._meter

        def charged(*args: Any, **kwargs: Any) -> str:
            meter.charge_format(template, "{", [*args, *kwargs.values()])
            return write(*args, **kwargs)

        return update_wrapper(charged, value)


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant writes, for training. Here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


def _charged(name: str, function: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """A filter that is charged before it runs."""
    # Some filters get the context or the environment first.
    place = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        value = args[place]
        if name == "join" and not isinstance(value, _SIZED):
            value = list(value)
            args = (*args[:place], value, *args[place + 1 :])
        meter.charge_filter(name, value, (*args[place + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return charged


# --- the program ----------------------------------------------------------------------------------


def _builds_lists(program: nodes.Template) -> bool:
    """Whether a template may put one list into another several times."""
    lists: list[nodes.List | nodes.Tuple | nodes.Dict] = []
    for kind in (nodes.List, nodes.Tuple, nodes.Dict):
        lists += program.find_all(kind)
    names = (node.name for node in program.find_all(nodes.Name))
    return any(each.items for each in lists) or "dict" in names


def _insert_turns(program: nodes.Template) -> None:
    """Charges each turn of loops, macros and blocks."""
    repeated: list[nodes.For | nodes.Macro | nodes.CallBlock] = []
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        repeated += program.find_all(kind)
    for node in repeated:
        num_chars = sum(len(literal.data) for literal in _literals(node.body))
        turn = _filter(_TURN, [nodes.Const(num_chars)])
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(turn, node.test)
        else:
            node.body.insert(0, nodes.ExprStmt(turn))


def _literals(body: Iterable[nodes.Node]) -> Iterator[nodes.TemplateData]:
    """The literal text of a body, without that of loops, macros and blocks in it."""
    for node in body:
        if isinstance(node, nodes.TemplateData):
            yield node
        elif not isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
            yield from _literals(node.iter_child_nodes())


def _replace_operators(node: nodes.Node) -> None:
    """Replaces ``+`` and ``~`` in all expressions of a node."""
    for name, value in list(node.iter_fields()):
        if isinstance(value, list):
            value[:] = map(_without_operators, value)
        elif isinstance(value, nodes.Node):
            setattr(node, name, _without_operators(value))


def _without_operators(node: Any) -> Any:
    if not isinstance(node, nodes.Node):
        return node
    if isinstance(node, nodes.Add):
        node = _filter(_SUM, list(_summands(node))).set_lineno(node.lineno)
    elif isinstance(node, nodes.Concat):
        node = _filter(_JOINED, node.nodes).set_lineno(node.lineno)
    _replace_operators(node)
    return node


def _summands(node: nodes.Expr) -> Iterator[nodes.Expr]:
    """a, b, c of a + b + c, which means (a + b) + c."""
    if isinstance(node, nodes.Add):
        yield from _summands(node.left)
        yield node.right
    else:
        yield node


def _filter(name: str, arguments: list[nodes.Expr]) -> nodes.Filter:
    return nodes.Filter(arguments[0], name, arguments[1:], [], None, None)
