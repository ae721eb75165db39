"""Adapts how the API reference reads the source: lazy packages, comments of fields, no special methods.

Lazy packages: where `__all__` is the sorted keys of a table of names, those keys are what is public.
Fields: a comment at the end of a field's line, `seconds: float  # until the last rank is done`, is what the field means.
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Module


class Reference(Extension):
    def on_module_members(self, *, node: Any, mod: Module, **_: Any) -> None:
        if not isinstance(node, ast.Module):
            return
        assigned = {ast.unparse(s.targets[0]): s.value for s in node.body if isinstance(s, ast.Assign)}
        public = assigned.get("__all__")
        if isinstance(public, ast.Call) and ast.unparse(public.func) == "sorted":
            table = assigned.get(ast.unparse(public.args[0]))
            if isinstance(table, ast.Dict):
                mod.exports = sorted(key.value for key in table.keys if isinstance(key, ast.Constant))

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Leaves out what Python calls by itself, as `__eq__`, and what a constructor keeps without a word on it."""
        initializer = cls.members.get("__init__")
        for name, member in list(cls.members.items()):
            special = name.startswith("__") and name not in ("__init__", "__call__")
            kept = member.is_attribute and initializer is not None and _within(member, initializer) and not member.docstring
            if special or kept:
                del cls.members[name]

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and attr.lineno == attr.endlineno:
            lines = attr.lines_collection[attr.filepath]
            _, mark, comment = lines[attr.lineno - 1].partition("  # ")
            if mark and not comment.startswith(("noqa", "type:", "pyright:")):
                attr.docstring = Docstring(comment, parent=attr, lineno=attr.lineno)


def _within(member: Any, function: Any) -> bool:
    return bool(function.lineno <= member.lineno <= function.endlineno)
