"""A document as one HTML page that needs nothing but itself.

All that comes from records is escaped, and a policy in the page's head allows
the browser no request and no script but the one below.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterator
from html import escape

from mq_jax.report import documents, style

MARK = '<meta name="generator" content="mq report">'

# What is not in view is laid out when it comes: long tables take their time.
_CSS = """
:root{color-scheme:light dark;--ink:#1b1b1b;--soft:#555;--line:#ddd;
--ground:#fff;--zebra:#f6f6f6;--link:#0059a0;--warn:#8a3b00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#aaa;--line:#444;
--ground:#161616;--zebra:#202020;--link:#7ab8f5;--warn:#ffb27a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--ground);
color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)}
p{max-width:48rem;margin:.6rem 0;overflow-wrap:anywhere}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0}
.warning{color:var(--warn);font-weight:600}
.scroll{overflow-x:auto;margin:1rem 0;max-width:100%}
table{border-collapse:collapse;font-size:.86rem;
font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.3rem 0;
overflow-wrap:anywhere}
caption span{position:sticky;left:0;display:inline-block;
max-width:min(48rem,calc(100vw - 2.2rem))}
th,td{padding:.2rem .6rem;text-align:left;vertical-align:top;
max-width:26rem;overflow-wrap:break-word}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom}
tbody tr:nth-child(even){background:var(--zebra)}
.n{text-align:right;white-space:nowrap}
td:first-child{min-width:9rem}.w{min-width:15rem}
b{font-weight:700;text-decoration:underline;text-underline-offset:.2em}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;
text-align:inherit;cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
section{content-visibility:auto;contain-intrinsic-size:auto 60rem}
figure{margin:1rem 0}
figcaption{color:var(--soft);font-size:.86rem;max-width:48rem;
overflow-wrap:anywhere}
figure .scroll{background:#fff;border-radius:4px;margin:.3rem 0}
svg{display:block;max-width:100%;height:auto;min-width:var(--least)}
pre{overflow-x:auto;font-size:.8rem;background:var(--zebra);padding:.6rem}
summary{cursor:pointer}
footer{margin-top:3rem;color:var(--soft);font-size:.86rem}
@media print{nav{display:none}.scroll{overflow:visible}
section{content-visibility:visible}
body{max-width:none;padding:0;font-size:10pt}
figure,tr{break-inside:avoid}thead{display:table-header-group}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      heads.forEach((h) => h.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const number = head.className === 'n';
      const key = (row) => {
        const text = row.cells[i].textContent;
        return number ? parseFloat(text) : text;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      const none = (x) => x === '' || Number.isNaN(x);
      const sign = down ? -1 : 1;
      rows.sort(([a], [b]) =>
        none(a) || none(b) ? none(a) - none(b)
        : sign * (number ? a - b : a.localeCompare(b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    };
  });
}
"""


def page(document: documents.Document) -> str:
  """The document as a page, complete.

  Examples:
    >>> '<script>alert' in page(documents.Document('<script>alert(1)', ()))
    False
  """
  digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
  policy = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    f"script-src 'sha256-{digest}'"
  )
  links = ''.join(
    f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>\n'
    for s in document.sections
  )
  prefixes = (f'f{i}-' for i in itertools.count())
  sections = ''.join(
    f'<section id="{s.anchor}">\n<h2>{escape(s.title)}</h2>\n'
    + '\n'.join(_block(block, prefixes) for block in s.blocks)
    + '\n</section>\n'
    for s in document.sections
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'{MARK}\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(document.title)}</title>\n<style>{_CSS}</style>\n</head>\n'
    f'<body>\n<header>\n<h1>{escape(document.title)}</h1>\n'
    f'<nav aria-label="Sections"><ul>\n{links}</ul></nav>\n</header>\n<main>\n'
    f'{sections}</main>\n<footer>Written by mq report.</footer>\n'
    f'<script>{_SCRIPT}</script>\n</body>\n</html>\n'
  )


def _block(block: documents.Block, prefixes: Iterator[str]) -> str:
  match block:
    case documents.Table():
      return _table(block)
    case documents.Figure():
      return _figure(block, next(prefixes))
    case documents.Text():
      kind = ' class="warning"' if block.warning else ''
      return f'<p{kind}>{escape(block.text)}</p>'
    case documents.Listing():
      return (
        f'<details><summary>{escape(block.name)}</summary>'
        f'<pre>{escape(block.content)}</pre></details>'
      )


def _table(table: documents.Table) -> str:
  """Closing tags that HTML does not ask for are left out: rows are many."""
  wide = {
    column
    for column, *cells in zip(table.columns, *table.rows)
    if not column.number and max(len(c.text) for c in cells) > 40
  }
  kind = lambda column: ' class=n' if column.number else ''
  head = lambda column: ' class=w' if column in wide else kind(column)
  heads = ''.join(
    f'<th scope=col{head(c)}>{escape(c.heading)}' for c in table.columns
  )
  mark = lambda cell: (
    f'<b>{escape(cell.text)}</b>' if cell.best else escape(cell.text)
  )
  rows = '\n'.join(
    '<tr>'
    + ''.join(
      f'<td{kind(column)}>{mark(cell)}'
      for column, cell in zip(table.columns, row, strict=True)
    )
    for row in table.rows
  )
  caption = (
    f'<caption><span>{escape(table.caption)}</span></caption>'
    if table.caption
    else ''
  )
  sortable = ' class=sortable' if table.sortable else ''
  # A box that scrolls can be reached by the keyboard.
  return (
    f'<div class=scroll tabindex=0><table{sortable}>{caption}\n<thead><tr>'
    f'{heads}\n<tbody>\n{rows}\n</table></div>'
  )


def _figure(figure: documents.Figure, prefix: str) -> str:
  words = escape(figure.caption)
  # Narrower than this its letters can't be read: then it scrolls.
  least = min(figure.image.get_figwidth() * 72, 620)
  image = style.svg(figure.image, prefix).replace(
    '<svg ', f'<svg role="img" aria-label="{words}" ', 1
  )
  return (
    f'<figure style="--least:{least:.0f}px">\n<div class=scroll tabindex=0>\n'
    f'{image}\n</div>\n<figcaption>{words}</figcaption>\n</figure>'
  )
