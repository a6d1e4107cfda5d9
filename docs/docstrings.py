"""A griffe extension: docstrings are prose for people at a terminal; this is what the site adds to them."""

import re
from typing import Any

import griffe

# Names of parameters that a colon follows, alone or in a row, a shape between: "mean, std [C, H, W]:".
NAMED = r"(?<![`\w.])((?:{names})(?:(?:,| and) (?:{names}))*)((?: \[[^\]]*\])?(?: \(or [^)]*\))?:)(?=\s|$)"
# Docstrings cite the design notes; readers of the site have their mathematics in concepts.md.
DESIGN = {
    "DESIGN 1": "[concepts](../concepts.html#conventions)",
    "DESIGN 2": "[concepts](../concepts.html#the-calibrated-sampler)",
}


class Prose(griffe.Extension):
    """Sets the parameters that a docstring explains as code, keeps `<A x, y>` from being a tag, and links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with every module, class, function and attribute."""
        if obj.docstring is None:
            return
        names = "|".join(sorted(map(re.escape, _names(obj)), key=len, reverse=True))
        named = re.compile(NAMED.format(names=names)) if names else None
        lines = obj.docstring.value.splitlines()
        obj.docstring.value = "\n".join(
            line if line.startswith("    ") else _set(line, named) for line in lines
        )


def _names(obj: griffe.Object) -> list[str]:
    if isinstance(obj, griffe.Function):
        return [parameter.name for parameter in obj.parameters]
    if not isinstance(obj, griffe.Class):
        return []
    constructor = obj.members.get("__init__")
    given = _names(constructor) if isinstance(constructor, griffe.Function) else []
    return given + [name for name, member in obj.members.items() if isinstance(member, griffe.Attribute)]


def _set(line: str, named: re.Pattern[str] | None) -> str:
    line = re.sub(r"<(?=\w)", "&lt;", line)
    line = re.sub(r"DESIGN \d", lambda found: DESIGN.get(found[0], found[0]), line)
    if named is None:
        return line
    return named.sub(lambda found: re.sub(r"\b(?!and\b)\w+", r"`\g<0>`", found[1]) + found[2], line)
