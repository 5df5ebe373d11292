"""An extension of griffe, which reads the Python page's names and docstrings: constants become their values, and what
is said of parameters and the examples become Markdown."""

import dataclasses
import importlib
import re

import griffe

CONSTANT = re.compile(r"[A-Z][A-Z_]+$|tuple\(|_setting\(")  # LEVELS, what it is made of, a field of RewardConfig


class AsMarkdown(griffe.Extension):
    def on_attribute(self, *, attr: griffe.Attribute, **_) -> None:
        attr.value = _value(attr.value, attr)

    def on_function(self, *, func: griffe.Function, **_) -> None:
        for parameter in func.parameters:
            parameter.default = _value(parameter.default, func)

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = _markdown(obj.docstring.value, [one.name for one in getattr(obj, "parameters", ())])


def _value(written: griffe.Expr | str | None, of: griffe.Object) -> griffe.Expr | str | None:
    if not CONSTANT.match(str(written)):
        return written
    value = eval(str(written), vars(importlib.import_module(of.module.path)))
    return repr(value.default if isinstance(value, dataclasses.Field) else value)


def _markdown(text: str, parameters: list[str]) -> str:
    """`first: what it is. second, third: what they are.` as a list if they are parameters; an example in a fence."""
    text = re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.MULTILINE | re.DOTALL)
    for name in parameters:
        text = re.sub(rf"(^|(?<=[.)]) )((?:\w+, )*{name}(?:, \w+)*): ", r"\n- `\2`: ", text, flags=re.MULTILINE)
    return text
