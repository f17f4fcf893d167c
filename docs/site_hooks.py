"""MkDocs hook: the built site works without a network.

No page may load a script, a style sheet, a picture, a frame or a font from another host. Links that
a reader may follow are another matter.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\s>]*"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|preconnect|icon))[^>]*"
    r"\bhref=[\"']?(?:https?:)?//[^\s>]*"
    r"|@import\s[^;]*//",
    re.IGNORECASE,
)


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Refuse a page that would load something from another host."""
    found = _LOADED.search(output)
    if found is not None:
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output
