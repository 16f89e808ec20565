"""Renames the local variables of Python functions: an augmentation, which DeepSeek does not report.

Scope by scope (libcst, which keeps comments and spaces), and only what nobody outside of a function
sees: no parameters, which callers may name, nothing imported, no `nonlocal`. What comes out is
compiled and compared with what went in, name by name, so that no use is left with the old name.
"""

from __future__ import annotations

import keyword
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from types import CodeType
from typing import Any

from dsjax.curate import sampling

# Functions that look variables up by their names.
_BY_NAME = {"locals", "vars", "eval", "exec", "dir", "globals"}
_NAMES = (
    "value item result data count index name key part total entry node line text first last left "
    "right size start end step path row column group other found current previous following source "
    "target output buffer chunk element record limit offset length width height number letter word "
    "pair field option state status message answer question amount level depth parent child owner "
    "member factor weight score rate share mean most least best choice guess piece slot place mark"
).split()


def rename(text: str, seed: int) -> str:
    """Returns Python source with other names for local variables; as it is, if it has none that can
    be renamed or is not Python.

    Raises:
      ValueError: libcst is not installed.
    """
    cst: Any = _libcst()
    taken = set(re.findall(r"\w+", text))
    before = _names_of(text)
    if before is None or taken & _BY_NAME:
        return text
    free = [name for name in _NAMES if name not in taken and not keyword.iskeyword(name)]
    try:
        wrapper = cst.metadata.MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
        changes = _changes(cst, wrapper, free, seed)
    except (cst.ParserSyntaxError, RecursionError):
        return text
    if not changes:
        return text

    class Renamer(cst.CSTTransformer):
        def leave_Name(self, original_node: Any, updated_node: Any) -> Any:
            name = changes.get(original_node)
            return updated_node.with_changes(value=name) if name else updated_node

    renamed = wrapper.module.visit(Renamer()).code
    return renamed if _names_of(renamed) == before else text


def library() -> str:
    """Returns name and version of the library, for the key of a stage.

    Raises:
      ValueError: it is not installed.
    """
    _libcst()
    return f"libcst {version('libcst')}"


def _changes(cst: Any, wrapper: Any, free: list[str], seed: int) -> dict[Any, str]:
    """Returns a new name for each node that is the name of a local variable."""
    from libcst import matchers
    from libcst.metadata import Assignment, FunctionScope, ScopeProvider

    statements: Any = matchers.findall(wrapper.module, matchers.Nonlocal() | matchers.Global())
    shared = {item.name.value for statement in statements for item in statement.names}
    found = wrapper.resolve(ScopeProvider).values()
    scopes = [scope for scope in dict.fromkeys(found) if isinstance(scope, FunctionScope)]
    changes: dict[Any, str] = {}
    given: dict[str, str] = {}  # a name is changed alike in the whole text
    for scope in scopes:
        for name in sorted({assignment.name for assignment in scope.assignments}):
            own = [part for part in scope.assignments if part.name == name]
            nodes: list[Any] = [part.node for part in own if isinstance(part, Assignment)]
            nodes += [access.node for part in own for access in part.references]
            if name in shared or len(nodes) < len(own) or name.startswith("__"):
                continue
            if not all(isinstance(node, cst.Name) and node.value == name for node in nodes):
                continue
            if name not in given:
                if not free:
                    continue
                place = sampling.position(name, seed) % len(free)
                given[name] = free.pop(place)
            changes |= dict.fromkeys(nodes, given[name])
    return changes


def _names_of(text: str) -> list[tuple[Any, ...]] | None:
    """Returns of each function what renaming leaves as it is, or None if this is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = compile(text, "<document>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return None
    return list(_described(code))


def _described(code: CodeType) -> Iterator[tuple[Any, ...]]:
    counts = len(code.co_varnames), len(code.co_cellvars), len(code.co_freevars)
    constants = [part for part in code.co_consts if not isinstance(part, CodeType)]
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    yield code.co_name, code.co_names, arguments, counts, repr(constants), len(code.co_code)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _described(part)


def _libcst() -> Any:
    try:
        import libcst
        import libcst.metadata
    except ImportError as error:
        raise ValueError(
            "renaming variables needs libcst: pip install 'dsjax[prepare]', or leave them: "
            "--set rename=0"
        ) from error
    return libcst
