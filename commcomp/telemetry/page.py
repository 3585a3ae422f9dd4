"""The HTML report: one file that needs nothing else, for narrow and wide screens, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from commcomp.telemetry import figures
from commcomp.telemetry.runs import Run

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2328; --soft: #59636e; --ground: #fff; --panel: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --ground: #0d1117; --panel: #151b23; --line: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--ground); }
h1 { font-size: 1.5rem; margin: .5rem 0; }
.caution { margin: .5rem 0; padding: .4rem .8rem; border-left: .25rem solid #d29922;
  background: var(--panel); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: .5rem; background: var(--panel); border-radius: .5rem; }
img { width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt, .soft { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def html_page(
    runs: Sequence[Run],
    *,
    table: Sequence[Sequence[str]],
    meanings: str,
    facts: Sequence[tuple[str, str]],
    cautions: Sequence[str],
) -> str:
    """Return the whole page. `table` holds the headings first; `facts` are (what, value)."""
    headings, *rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    figure_tags = "\n".join(_figure(description, draw, runs) for description, draw in figures.PANELS.items())
    fact_tags = "\n".join(f"<dt>{escape(what)}</dt><dd>{escape(value)}</dd>" for what, value in facts)
    caution_tags = "\n".join(f'<p class="caution">{escape(caution)}</p>' for caution in cautions)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training runs compared</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Training runs compared</h1>
{caution_tags}
<div class="wide"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
<p class="soft">{escape(meanings)}</p>
<div class="figures">
{figure_tags}
</div>
<h2>What these numbers depend on</h2>
<dl>
{fact_tags}
</dl>
</body>
</html>
"""


def _figure(description: str, draw: figures.Draw, runs: Sequence[Run]) -> str:
    light, dark = (_data_uri(figures.svg_of(draw, runs, theme)) for theme in ("light", "dark"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(description)}"></picture></figure>'
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
