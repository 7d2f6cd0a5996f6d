"""Run the percent scripts and write the notebooks beside them.

From the repository, with the `notebooks` extra installed:

python notebooks/execute.py            # all
python notebooks/execute.py 02 05      # those whose names begin so
"""

import pathlib
import sys

import jupytext
import nbclient

HERE = pathlib.Path(__file__).resolve().parent


def execute(script: pathlib.Path) -> None:
  """Write the executed notebook of a script; nothing in it names the day."""
  notebook = jupytext.read(script)
  nbclient.NotebookClient(
    notebook,
    timeout=600,
    coalesce_streams=True,
    resources={'metadata': {'path': str(HERE)}},
  ).execute()
  notebook.metadata.pop('language_info', None)
  for index, cell in enumerate(notebook.cells):
    cell['id'] = f'cell-{index}'
    cell.metadata.clear()
  text = jupytext.writes(notebook, fmt='ipynb')
  script.with_suffix('.ipynb').write_text(text.rstrip() + '\n')


def main(chosen: list[str]) -> None:
  for script in sorted(HERE.glob('[0-9]*.py')):
    if not chosen or script.name.startswith(tuple(chosen)):
      print(script.name, flush=True)
      execute(script)


if __name__ == '__main__':
  main(sys.argv[1:])
