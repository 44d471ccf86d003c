"""The frame of a report: one HTML file that loads nothing else, its sections, and its style sheet for light and dark
screens, from the width of a phone to that of a laptop."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

from common.errors import UserError

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#171a21;--soft:#626b7a;--line:#e3e6ec;--s0:#4a4ee0;--s1:#d9772b;
  --s2:#1f9d8a;--s3:#b0479b;--s4:#8a8f1c;--s5:#3a8fd0;--s6:#c2453c;--s7:#6b7280;
  --grey:#98a1b0;--good:#14894e;--bad:#d23b3b}
@media(prefers-color-scheme:dark){
  :root{--bg:#0f1116;--card:#181b22;--ink:#e8eaf0;--soft:#99a2b2;--line:#2a2f3a;--s0:#8d92ff;--s1:#f0a060;
     --s2:#4fd0bc;--s3:#e08ad0;--s4:#c9cf5a;--s5:#7cc0f5;--s6:#ff8d84;--s7:#a3acba;
     --grey:#6b7484;--good:#3fc57f;--bad:#ff6f6f}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:auto;padding:36px 18px 64px}
h1{font-size:2.1rem;line-height:1.2;margin:0 0 .2em;overflow-wrap:anywhere}
p,li,dd,td,h3,summary,figcaption,.legend{overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:48px 0 4px}
h3{font-size:.95rem;margin:0;display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1em}
p{margin:.4em 0;max-width:90ch}
h3 span{font-weight:400}
.soft,figcaption,small,dt,th,h3 span{color:var(--soft)}
.soft{font-size:.92rem}
.chip{display:inline-block;border-radius:9px;padding:1px 10px;font-size:.85rem;font-weight:600;
  color:var(--card);background:var(--s1)}
.done{background:var(--good)}
.bad{background:var(--bad)}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;min-width:0}
.grid{display:grid;gap:14px;margin-top:14px;grid-template-columns:repeat(auto-fit,minmax(min(100%,var(--least)),1fr))}
dd{margin:0;font-weight:600}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(120px,1fr));gap:12px;margin:18px 0 0}
.wide{grid-column:1/-1}
dt,th{font-size:.82rem}
table{border-collapse:collapse;width:100%;margin:10px 0 6px;font-variant-numeric:tabular-nums}
th{font-weight:400;text-align:left}
td,th{padding:5px 10px 5px 0}
td:nth-child(2){width:62%}
td:last-child,th:last-child{text-align:right;padding-right:0}
.bar,i{display:block;height:8px;border-radius:4px;margin-top:2px;background:var(--line)}
i{margin:0;background:var(--grey)}
.pretrained i{background:var(--s0)}
.pretrained th{color:var(--ink);font-weight:650}
figure{margin:0;min-width:0}
.up,.right figcaption{color:var(--good)}
.down,.wrong figcaption{color:var(--bad)}
.s0{color:var(--s0)}
.s1{color:var(--s1)}
.s2{color:var(--s2)}
.s3{color:var(--s3)}
.s4{color:var(--s4)}
.s5{color:var(--s5)}
.s6{color:var(--s6)}
.s7{color:var(--s7)}
svg{display:block;width:100%;margin-top:8px;font-size:12.5px}
text{fill:var(--soft)}
line{stroke:var(--line)}
circle{fill:currentColor}
polyline{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.raw{stroke-width:1;opacity:.28}
.drawn{max-width:640px}
img{display:block;width:100%;border-radius:6px}
.drawn img,.pixels img{image-rendering:pixelated}
figcaption{font-size:.82rem;margin-top:3px}
.strip{display:grid;gap:10px;margin-top:14px;grid-template-columns:repeat(auto-fit,minmax(min(46%,150px),1fr))}
.similar{display:grid;grid-template-columns:repeat(3,1fr);gap:8px}
.similar canvas,.similar figure>img{display:block;width:100%;aspect-ratio:1;border-radius:6px;image-rendering:pixelated}
.picker{position:relative;cursor:crosshair;touch-action:manipulation}
.picker:focus-visible{outline:3px solid var(--s0);outline-offset:2px;border-radius:6px}
.mark{position:absolute;outline:2px solid #fff;box-shadow:0 0 0 4px #0009;pointer-events:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.82rem;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;margin-right:5px}
.captioned{display:grid;grid-template-columns:96px 1fr;gap:12px;align-items:start}
.captioned p{margin:0;font-weight:600}
.captioned ol{margin:.3em 0 0;padding-left:1.3em;font-size:.88rem}
.learned h2{margin-top:28px}
.scroll{overflow-x:auto}
.runs{table-layout:fixed}
.runs td,.runs th{vertical-align:top;width:auto!important;text-align:left!important}
.runs tr:first-child th{color:var(--ink);font-weight:650}
@media(max-width:560px){.strip figure:first-child:nth-last-child(odd){grid-column:1/-1}}
.near img{aspect-ratio:1;outline-offset:-2px}
.near{display:grid;grid-template-columns:1.1fr repeat(6,1fr);gap:6px;padding:12px}
.near figure:first-child{margin-right:8px}
.near figcaption{font-size:.72rem;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.right img{outline:3px solid var(--good)}
.wrong img{outline:3px solid var(--bad)}
summary{cursor:pointer;font-weight:600}
.lead{font-size:1.15rem}
.lead .soft{font-size:1em}
.next{margin-top:14px}
.next p{font-size:.88rem}
details{margin-top:14px}
code{overflow-wrap:anywhere}
pre{overflow:auto;font-size:.82rem}
"""
ENDING = " · unlabeled</title>"  # of the title of each page, by which later commands know it
MAX_HEAD = 4096  # characters in which it is


def page(path: Path, title: str, *parts: str, script: str = "") -> Path:
    """Write a page with the given parts, which are HTML, and return its path. `script`: the only JavaScript that a
    browser executes in this page, which its policy states by a hash; the policy also forbids to load anything. Raises
    UserError if the file exists and is no such page."""
    if path.exists() and ENDING not in path.read_text(encoding="utf-8", errors="replace")[:MAX_HEAD]:
        raise UserError(f"{path}: exists already, and this command has not written it; name another file")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {scripts}"
    partial = path.with_name(f".{path.name}")
    partial.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}{ENDING}<style>{STYLE}</style>"
        f"<main>{''.join(parts)}</main>{f'<script>{script}</script>' if script else ''}</html>\n",
        encoding="utf-8",
        errors="backslashreplace",  # names of files may hold bytes that are not UTF-8
    )
    return partial.replace(path)


def section(title: str, text: str, *parts: str, columns: str = "300px", kind: str = "grid") -> str:
    """A section as HTML; "" if it has neither text nor parts. `columns`: the smallest width of a column of `parts`;
    `kind`: the CSS class of the element that contains `parts`."""
    body = f'<div class="{kind}" style="--least:{columns}">{"".join(parts)}</div>' if any(parts) else ""
    words = f'<p class="soft">{text}</p>' if text else ""
    return f"<section><h2>{title}</h2>{words}{body}</section>" if body or words else ""


def folded(title: str, *parts: str, columns: str = "300px") -> str:
    """A card that shows its parts when it is opened; "" if there are none."""
    body = f'<div class="grid" style="--least:{columns}">{"".join(parts)}</div>'
    return f'<details class="card"><summary>{title}</summary>{body}</details>' if any(parts) else ""
