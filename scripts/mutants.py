# pyright: reportMissingImports=false
"""Mutants of a source file: copies with one small fault each, of cosmic-ray's operators and of four more.

Excluded is what no test of behaviour may see: docstrings, annotations, type aliases, the words of an error,
imports, `__all__`, and the arguments of `dataclass` and `lru_cache`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.plugins import get_operator

Position = tuple[int, int]
Span = tuple[Position, Position]
Edit = tuple[Span, str]

OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in (
        "Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul",
        "LShift_RShift", "RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr",
    )),
    *(f"ReplaceComparisonOperator_{pair}" for pair in (
        "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE",
        "Gt_LtE", "GtE_Gt", "GtE_Lt",
    )),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "AddNot", "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator",
    "ZeroIterationForLoop",
)  # fmt: skip
"""cosmic-ray's, one replacement of a kind: `*` becomes `/`, and not each of ten others."""
UNSEEN_CALLS = ("dataclass", "lru_cache")
"""Calls whose arguments decide speed and comfort alone."""
MODULES = ("torch", "F", "nn", "math", "re", "json", "functools", "random")
NO_CHANGE = ("to", "cpu", "contiguous")
"""Methods that may be dropped without a difference on the CPU."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault, known by its words, not by its place: files move and grow."""

    function: str
    before: str
    """The line's text; the first where a fault takes several."""
    after: str
    line: int
    source: str
    """The whole file with the fault."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by inside its file."""
        return self.function, self.before, self.after


def mutants_of(source: str) -> list[Mutant]:
    """Returns the mutants of a file in the order of its lines, each key once."""
    tree = ast.parse(source)
    unseen, unchanged = list(_unseen(tree)), ast.dump(tree)
    edited = ((span[0][0], _edited(source, span, words)) for span, words in _edits(source, tree, unseen))
    found: dict[tuple[str, str, str], Mutant] = {}
    for line, text in (*_of_cosmic_ray(source, unseen), *edited):
        if _is_other_code(text, unchanged):
            mutant = _mutant(source, tree, line, text)
            found.setdefault(mutant.key, mutant)
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.after))


def _is_other_code(text: str, unchanged: str) -> bool:
    try:
        return ast.dump(ast.parse(text)) != unchanged
    except SyntaxError:
        return False


def _mutant(source: str, tree: ast.Module, line: int, text: str) -> Mutant:
    old, new = source.splitlines(), text.splitlines()
    while line < len(old) and line <= len(new) and old[line - 1] == new[line - 1]:
        line += 1
    after = _plain(new[line - 1]) if len(new) == len(old) else "..."
    return Mutant(_function_at(tree, line), _plain(old[line - 1]), after, line, text)


def _plain(line: str) -> str:
    return re.sub(r"(?<=[\[(]) ", "", " ".join(line.split()))


def _function_at(tree: ast.Module, line: int) -> str:
    names: list[str] = []
    body: list[Any] = [tree]
    while body:
        inner = [n for parent in body for n in ast.iter_child_nodes(parent)
                 if _first_line(n) <= line <= getattr(n, "end_lineno", 0)]  # fmt: skip
        names += [n.name for n in inner if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        body = inner
    return ".".join(names) or "module"


def _first_line(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", None)
    return decorators[0].lineno if decorators else getattr(node, "lineno", 1 << 30)


def _of_cosmic_ray(source: str, unseen: list[Span]) -> Iterator[tuple[int, str]]:
    tree: Any = get_ast(source)
    nodes: list[Any] = list(ast_nodes(tree))
    for name in OPERATORS:
        operator: Any = get_operator(f"core/{name}")()
        for node in nodes:
            for index, span in enumerate(list(operator.mutation_positions(node))):
                if not _is_inside(span, unseen):
                    yield span[0][0], _with(tree, node, operator, index)


def _with(tree: Any, node: Any, operator: Any, index: int) -> str:
    """Returns the code of a tree with one mutation, and takes the mutation back."""
    inside: list[Any] = list(ast_nodes(node))
    children = [(part, list(part.children)) for part in inside if hasattr(part, "children")]
    values = [(part, part.value) for part in inside if hasattr(part, "value")]
    siblings: list[Any] = node.parent.children if node.parent else []
    before = list(siblings)
    changed = operator.mutate(node, index)
    if changed is not node:
        place = next(i for i, sibling in enumerate(siblings) if sibling is node)
        siblings[place : place + 1] = [] if changed is None else [changed]
    code = str(tree.get_code())
    siblings[:] = before
    for part, kept in children:
        part.children = kept
    for part, value in values:
        part.value = value
    return code


def _is_inside(span: Span, others: list[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in others)


def _span(node: Any) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _unseen(tree: ast.Module) -> Iterator[Span]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield _span(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings
            yield _span(node)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield _span(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield _span(node.returns)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield _span(node.exc)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield _span(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in UNSEEN_CALLS:
            yield _span(node)
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
            yield (_first_line(node), 0), (node.end_lineno or 0, node.end_col_offset or 0)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            yield _span(node)
        elif isinstance(node, ast.Name) and node.id in UNSEEN_CALLS:
            yield (node.lineno, node.col_offset - 1), (node.end_lineno or 0, (node.end_col_offset or 0) + 1)
    for node in tree.body:  # type aliases
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            yield _span(node)


def _edited(source: str, span: Span, replacement: str) -> str:
    lines = source.splitlines(keepends=True)
    (first, left), (last, right) = span
    head = lines[first - 1].encode()[:left].decode()
    tail = lines[last - 1].encode()[right:].decode()
    return "".join([*lines[: first - 1], head + replacement + tail, *lines[last:]])


def _edits(source: str, tree: ast.Module, unseen: list[Span]) -> Iterator[Edit]:
    for node in ast.walk(tree):
        for span, replacement in _edits_of(source, node):
            if not _is_inside(span, unseen):
                yield span, replacement


def _edits_of(source: str, node: Any) -> Iterator[Edit]:
    def text(part: ast.expr) -> str:
        return f"({' '.join((ast.get_source_segment(source, part) or '').split())})"

    match node:
        case ast.BinOp(op=ast.MatMult() | ast.Mod() | ast.BitOr() | ast.BitAnd()):
            pass
        case ast.BinOp():  # an operand is removed
            yield _span(node), text(node.left)
            if isinstance(node.op, (ast.Add, ast.Mult)):
                yield _span(node), text(node.right)
        case ast.BoolOp():
            word = " and " if isinstance(node.op, ast.And) else " or "
            for place in range(len(node.values)):
                rest = [value for i, value in enumerate(node.values) if i != place]
                yield _span(node), f"({word.join(text(value) for value in rest)})"
        case ast.comprehension():  # a condition is negated, or removed
            for condition in node.ifs:
                yield _span(condition), f"not {text(condition)}"
                yield _span(condition), "True"
        case ast.Call(func=ast.Attribute(value=receiver, attr=name)):  # a method call is removed
            if name not in NO_CHANGE and not (isinstance(receiver, ast.Name) and receiver.id in MODULES):
                yield _span(node), text(receiver)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete():  # so is a statement
            yield _span(node), "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield _span(node), "pass"
        case _:
            pass
