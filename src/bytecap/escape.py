r"""Text from files as a terminal may be given it: what a file says never speaks to the terminal.

Names of units, files and directories, and what a model writes, may hold control sequences (which move the cursor, set
the title, or write to the clipboard), marks that turn the direction of writing, and markup of the library that draws
tables. `shown` writes the first two as escapes, and `console` draws without markup.

>>> shown("a\x1b[2Jb"), shown("\u202egpj.exe"), shown("run[v2].bcap")
('a\\x1b[2Jb', '\\u202egpj.exe', 'run[v2].bcap')
>>> shown("one\ntwo"), shown("one\ntwo\x07", keep="\n")
('one\\ntwo', 'one\ntwo\\x07')
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories that are not drawn as themselves
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown(text: str, *, keep: str = "", most: int = 0) -> str:
    """Text without control characters, which are written as escapes.

    Args:
        text: any string, lone surrogates of file names included.
        keep: characters that stay although they are controls.
        most: characters after which the rest is left out; 0 for all.
    """
    if most and len(text) > most:
        text = f"{text[: most * 2 // 3]}…{text[-most // 3 :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text)


def console(**options: Any) -> Console:
    r"""A console of the `rich` library that takes every string for text: no markup, no emoji names, no controls.

    What is meant to be drawn in colours is a `rich.text.Text`, see `styled`.

    >>> import io
    >>> out = io.StringIO()
    >>> console(file=out).print("[bold]a[/] :smile: \x1b[2J", highlight=False)
    >>> out.getvalue() == "[bold]a[/] :smile: \\x1b[2J\n"
    True
    """
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **style: Any) -> Text:
            """Any string that is printed or stands in a table."""
            return super().render_str(shown(text, keep="\n"), **{**style, "markup": False, "emoji": False})

    return Plain(markup=False, emoji=False, **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of parts, each a string or a string and its style; controls are escaped."""
    from rich.text import Text

    return Text.assemble(*(shown(p) if isinstance(p, str) else (shown(p[0]), p[1]) for p in parts))


def _escaped(c: str) -> str:
    code = ord(c)
    return _SHORT.get(c) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
