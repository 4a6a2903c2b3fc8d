"""What every page that this project writes is made of around its content: style, script, policy.

A page asks no network for anything, and its policy forbids it to. It fits a narrow window, where what is wide scrolls
by itself, and follows a dark scheme. Its one script sorts a table by the column whose header is clicked; the page is
whole without scripts. tests/test_pages_browser.py opens every page in a browser.
"""

from __future__ import annotations

import base64
import hashlib
import html

STYLE = r"""
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#ddd;--faint:#595959;--block:#f4f4f4;--bad:#a00}
@media(prefers-color-scheme:dark){
:root{--ink:#ddd;--paper:#181818;--line:#444;--faint:#aaa;--block:#282828;--bad:#f99}}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}
td,th{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}td:first-child{min-width:6rem}
img,audio{max-width:100%}img.chart,td img{max-width:none}
pre{background:var(--block);padding:.8rem;font-size:13px}pre,figure,.wide{overflow-x:auto}
.failed{color:var(--bad)}figure{margin:1rem 0}figcaption{color:var(--faint)}
th[tabindex]{cursor:pointer}th[aria-sort=ascending]:after{content:" \25b2"}
th[aria-sort=descending]:after{content:" \25bc"}
"""

# Numbers by value, other texts by their letters, and cells that are empty or nan last; once more turns the order.
SCRIPT = r"""
const number = /^[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?$/i;
for (const header of document.querySelectorAll("thead th")) {
  const text = row => row.cells[header.cellIndex].textContent.trim();
  const value = row => parseFloat(text(row).replaceAll(",", ""));
  const lacks = row => ["", "nan"].includes(text(row));
  const sort = () => {
    const body = header.closest("table").tBodies[0], sign = header.ariaSort === "ascending" ? -1 : 1;
    const rows = [...body.rows].filter(row => !lacks(row)), others = [...body.rows].filter(lacks);
    const compare = rows.every(row => number.test(text(row))) ? (a, b) => value(a) - value(b)
      : (a, b) => text(a).localeCompare(text(b), "en", {numeric: true});
    for (const other of header.parentNode.cells) other.ariaSort = null;
    header.ariaSort = sign > 0 ? "ascending" : "descending";
    body.append(...rows.sort((a, b) => sign * compare(a, b)), ...others);
  };
  header.tabIndex = 0;
  header.title = "sort by this column";
  header.addEventListener("click", sort);
  header.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
}
"""

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
)


def whole(title: str, body: str) -> str:
    """An HTML document of this body, which is HTML; the title is text."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    shown = f"<h1>{html.escape(title)}</h1>{body}<script>{SCRIPT}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{shown}</body></html>\n'
