# SPDX-License-Identifier: Apache-2.0
"""One HTML file that needs nothing beside it and asks the network for nothing: how every report is laid out."""

import base64
import html
from collections.abc import Sequence

CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#26323f;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem} .dim{color:#667380}
.cards{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.2rem 0}
.card{border:1px solid #dde3e8;border-radius:8px;padding:.6rem 1rem;min-width:7.5rem}
.card b{display:block;font-size:1.35rem}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(21rem,1fr));gap:1.2rem}
figure{margin:0} .plots .wide{grid-column:1/-1} img{width:100%} figcaption{color:#667380;font-size:.88rem}
table{border-collapse:collapse;width:100%;font-size:.88rem}
td,th{border-bottom:1px solid #e6eaee;padding:.35rem .5rem;text-align:left;vertical-align:top}
code{font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.right{color:#3c8d5a} .wrong{color:#b5382f}
pre{overflow:auto;background:#f5f7f9;padding:1rem}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets a page do: nothing from anywhere else, no script."""


def page(title: str, body: Sequence[str], css: str = "") -> bytes:
    """A whole page in UTF-8, from the parts of its body, which are HTML; `css` comes behind that of every page."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{CSS}{css}</style>'
    )
    text = f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}</body></html>"
    return text.encode("utf-8", "backslashreplace")  # answers may hold half a surrogate pair


def figure(name: str, png: bytes, caption: str, wide: bool = False) -> str:
    """A picture with what it says below it; a wide one takes the whole width of `.plots`."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure{" class=wide" if wide else ""}><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
