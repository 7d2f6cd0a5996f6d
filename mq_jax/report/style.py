"""One look for all figures: what is drawn, in which greys, and as what file.

Shapes, lines and hatches tell things apart, so that a figure reads the same
without colour; the greys of the colours differ too.
"""

import contextlib
import io
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
from matplotlib import figure as mpl
from matplotlib.backends import backend_agg

MARKERS = 'osD^vP*X<>hp'
COLORS = (
  '#1b1b1b',
  '#0072b2',
  '#d55e00',
  '#56b4e9',
  '#009e73',
  '#e69f00',
  '#7a3e9d',
  '#a0522d',
)
LINE = '0.55'  # of fronts, and of leaders to labels
SCALE = 'cividis'  # of heat maps: as even in grey as in colour
DASHES = (0, (5, 3))  # of the unquantized model
BEYOND = '0.95'  # ground of what lies beyond an axis

_TITLE, _SMALL = 10, 7  # points
_FONTS = 'DejaVu Sans,Verdana,sans-serif'  # as wide as each other


def new(width: float, height: float) -> mpl.Figure:
  """An empty figure in inches, without pyplot and without a display."""
  fig = mpl.Figure(figsize=(width, height), dpi=150, layout='constrained')
  backend_agg.FigureCanvasAgg(fig)  # measures text
  return fig


def grid(axes, axis: str = 'both') -> None:
  """Thin lines behind what is drawn."""
  axes.set_axisbelow(True)
  axes.grid(True, axis=axis, color='0.9', lw=0.6)


def title(axes, text: str) -> None:
  """A heading of a panel; a dollar in it is a dollar, here as elsewhere."""
  axes.set_title(text, fontsize=_TITLE, parse_math=False)


def footnote(fig: mpl.Figure, text: str) -> None:
  """What was run, with config and seed, at the foot; nothing if empty."""
  if text:
    fig.supxlabel(
      text,
      fontsize=_SMALL,
      color='0.3',
      ha='left',
      x=0.01,
      parse_math=False,
    )


def looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
  """A marker and a colour for each name.

  Examples:
    >>> looks(['rtn', 'gptq'])['gptq']
    ('s', '#0072b2')
  """
  pairs = zip(itertools.cycle(MARKERS), itertools.cycle(COLORS))
  return dict(zip(dict.fromkeys(names), pairs))


def save(fig: mpl.Figure, path: pathlib.Path) -> None:
  """Write a figure as PNG, whole or not at all."""
  part = path.with_name(f'.{path.name}.part')
  fig.savefig(part, format='png')
  part.replace(path)


def svg(fig: mpl.Figure, prefix: str = '') -> str:
  """A figure as an `svg` element for a page of HTML.

  Its text is text: it can be searched, read aloud and copied. Nothing of it
  names the day or the machine.

  Args:
    fig: The figure.
    prefix: Begins all names in it, which a page must not hold twice.
  """
  out = io.StringIO()
  with _vectors():
    fig.savefig(out, format='svg')
  text = out.getvalue()
  text = text[text.index('<svg') :]
  text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->', '', text, flags=re.S)
  used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', text))
  names = {name: f'{prefix}{i}' for i, name in enumerate(used)}
  # Only within tags: what a label says, stays.
  text = re.sub(r'<[^>]*>', lambda tag: _tag(tag[0], names), text)
  text = re.sub(r'\n\s*', '\n', text).strip()
  return text.replace('<svg ', f'<svg font-family="{_FONTS}" ', 1)


def _tag(tag: str, names: Mapping[str, str]) -> str:
  """A tag of half the size and the same look.

  Args:
    tag: From < to >.
    names: New names of what is referred to; others only take room.
  """
  tag = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', '', tag)
  tag = re.sub(r"font-family: ['\w ,-]*;? ?", '', tag)
  tag = re.sub(r' transform="rotate\(-0 [^"]*"', '', tag)
  keep = lambda found: f' id="{names[found[1]]}"' if found[1] in names else ''
  tag = re.sub(r' id="([^"]*)"', keep, tag)
  refer = lambda found: f'{found[1]}#{names[found[2]]}'
  tag = re.sub(r'(href="|url\()#([^")]+)', refer, tag)
  tag = tag.replace('xlink:href', 'href').replace('base64,\n', 'base64,')
  # Hundredths of a point; but scales are small numbers.
  return re.sub(r'(?<!scale\()(?<![\d.])(\d+\.\d\d)\d+', r'\1', tag)


@contextlib.contextmanager
def _vectors() -> Iterator[None]:
  settings = {'svg.fonttype': 'none', 'svg.hashsalt': 'mq_jax'}
  with matplotlib.rc_context(settings):
    yield
