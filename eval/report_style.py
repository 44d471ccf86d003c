"""The style sheet of a run's report (`report.py`), for light and dark screens."""

STYLE = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#171a21;--soft:#626b7a;--line:#e3e6ec;--s0:#4a4ee0;--s1:#d9772b;
  --grey:#98a1b0;--good:#14894e;--bad:#d23b3b}
@media(prefers-color-scheme:dark){
  :root{--bg:#0f1116;--card:#181b22;--ink:#e8eaf0;--soft:#99a2b2;--line:#2a2f3a;--s0:#8d92ff;--s1:#f0a060;
     --grey:#6b7484;--good:#3fc57f;--bad:#ff6f6f}
}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:auto;padding:36px 18px 64px}
h1{font-size:2.1rem;line-height:1.2;margin:0 0 .2em;overflow-wrap:anywhere}
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
svg{display:block;width:100%;margin-top:8px;font-size:12.5px}
text{fill:var(--soft)}
line{stroke:var(--line)}
circle{fill:currentColor}
polyline{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.raw{stroke-width:1;opacity:.28}
.drawn{max-width:640px}
img{display:block;width:100%;border-radius:6px}
.drawn img,.mosaics img+img{image-rendering:pixelated}
figcaption{font-size:.82rem;margin-top:3px}
.mosaics{display:grid;gap:10px;margin-top:14px}
.mosaics figcaption{grid-column:1/-1;margin-top:-6px}
.near img{aspect-ratio:1;outline-offset:-2px}
.near{display:grid;grid-template-columns:1.1fr repeat(6,1fr);gap:6px;padding:12px}
.near figure:first-child{margin-right:8px}
.near figcaption{font-size:.72rem;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.right img{outline:3px solid var(--good)}
.wrong img{outline:3px solid var(--bad)}
summary{cursor:pointer;font-weight:600}
.lead{font-size:1.15rem}
.next{margin-top:14px}
.next p{font-size:.88rem}
details{margin-top:14px}
code{overflow-wrap:anywhere}
pre{overflow:auto;font-size:.82rem}
"""
