"""A document as Markdown, and its tables as LaTeX."""

import re

from mq_jax.report import documents, tables

MARKDOWN_MARK, LATEX_MARK = '<!-- by mq report -->', '% by mq report'

_LATEX = {
  '\\': r'\textbackslash{}',
  '~': r'\textasciitilde{}',
  '^': r'\textasciicircum{}',
  '<': r'\textless{}',
  '>': r'\textgreater{}',
  '|': r'\textbar{}',
  '"': r'\textquotedbl{}',
  '–': '--',
  '≤': r'$\leq$',
  '·': r'$\cdot$',
  **{c: f'\\{c}' for c in '&%$#_{}'},
}


def markdown(document: documents.Document) -> str:
  """The document without its figures."""
  parts = [MARKDOWN_MARK, f'# {_prose(document.title)}']
  for section in document.sections:
    # Figures are in the page; what has nothing else is left out.
    blocks = [
      _markdown_block(block)
      for block in section.blocks
      if not isinstance(block, documents.Figure)
    ]
    if blocks:
      parts += [f'## {_prose(section.title)}', *blocks]
  return '\n\n'.join(parts) + '\n'


def _prose(text: str) -> str:
  """Text that Markdown takes as it stands: no tags, emphasis or links.

  Examples:
    >>> _prose('<b> *x* [y](z)')
    '\\\\<b> \\\\*x\\\\* \\\\[y\\\\](z)'
  """
  return re.sub(r'([\\`*_\[\]<#|])', r'\\\1', ' '.join(text.split()))


def _markdown_block(block: documents.Block) -> str:
  match block:
    case documents.Table():
      mark = lambda cell: (
        f'**{_prose(cell.text)}**' if cell.best else _prose(cell.text)
      )
      table = tables.markdown_table(
        [_prose(column.heading) for column in block.columns],
        [column.number for column in block.columns],
        [[mark(cell) for cell in row] for row in block.rows],
      )
      return f'{_prose(block.caption)}\n\n{table}'.strip()
    case documents.Listing():
      # A fence longer than any within.
      runs = re.findall('`+', block.content)
      fence = '`' * max([3, *(len(run) + 1 for run in runs)])
      return (
        f'{_prose(block.name)}\n\n{fence}\n{block.content.strip()}\n{fence}'
      )
    case documents.Text():
      return _prose(block.text)


def escape_latex(text: str) -> str:
  """Text that LaTeX prints as it stands.

  Examples:
    >>> print(escape_latex(r'50% of a_b \\ {x}'))
    50\\% of a\\_b \\textbackslash{} \\{x\\}
  """
  return ''.join(_LATEX.get(c, c) for c in text if c.isprintable())


def latex(document: documents.Document) -> str:
  """The tables, each a `table` of booktabs, to be taken by `input`."""
  found = [b for b in document.blocks() if isinstance(b, documents.Table)]
  head = (
    f'{LATEX_MARK}: {" ".join(document.title.split())}\n'
    '% needs \\usepackage[T1]{fontenc} and \\usepackage{booktabs}\n'
  )
  return '\n'.join([head, *map(_latex_table, found)])


def _latex_table(table: documents.Table) -> str:
  line = lambda cells: ' & '.join(cells) + r' \\'
  mark = lambda cell: (
    rf'\textbf{{{escape_latex(cell.text)}}}'
    if cell.best
    else escape_latex(cell.text)
  )
  # Braces keep a bracket from being read as an option of the line before.
  first = lambda cells: [f'{{{cells[0]}}}', *cells[1:]]
  shape = ''.join('r' if column.number else 'l' for column in table.columns)
  heads = [escape_latex(column.heading) for column in table.columns]
  rows = [line(first([mark(cell) for cell in row])) for row in table.rows]
  return '\n'.join(
    [
      r'\begin{table}',
      r'\centering\small',
      rf'\caption{{{escape_latex(table.caption)}}}',
      rf'\begin{{tabular}}{{{shape}}}',
      r'\toprule',
      line(first(heads)),
      r'\midrule',
      *rows,
      r'\bottomrule',
      r'\end{tabular}',
      r'\end{table}',
      '',
    ]
  )
