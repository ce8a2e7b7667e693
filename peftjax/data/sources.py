"""Opens a split of any data set by its name.

  open_split('kmnist', 'train')                         peftjax.data.builders
  open_split('tfds:glue/sst2', 'validation')            peftjax.data.tfds_sets
  open_split('data:sst2', 'test', path='data')          peftjax.data.manifest
  open_split('file:reviews/{split}.csv', 'train',
             columns=dict(text='review'))               peftjax.data.files

What comes back is a `Source`: examples with len() and [i], their kind, the
names of the labels, the metric. `peftjax.data.examples` says what the examples
of each kind hold.
"""

from peftjax.data import builders
from peftjax.data.examples import check_example
from peftjax.data.examples import Examples
from peftjax.data.examples import Source
from peftjax.data.examples import split_name
from peftjax.data.files import open_file
from peftjax.data.manifest import find_folder
from peftjax.data.manifest import open_set
from peftjax.data.manifest import set_names
from peftjax.method import nearest

_PREFIXES = ('tfds:', 'data:', 'file:')


def open_split(name, split, path='', **options):
  """One split of one data set.

  Args:
    name: 'kmnist' and its like, 'tfds:NAME', 'data:NAME' or 'file:PATH'.
    split: 'train', 'validation', 'test', or what else the set has; a part of
      one as in 'train[:80%]'.
    path: the folder of 'tfds:' and 'data:' sets where it is not the usual one.
    **options: of `open_tfds` (labelled) and `open_file` (columns, labels, kind,
      metric).

  Returns:
    A `Source`.

  Raises:
    ValueError: unknown name, split or option; a missing column; an empty split;
      a label outside the label set (for sets that are read example by example,
      when the example is).
    FileNotFoundError: the files are not there.
  """
  prefix, _, rest = name.partition(':')
  prefix += ':' if rest else ''
  allowed = {'tfds:': ('labelled',),
             'file:': ('columns', 'labels', 'kind', 'metric')}.get(prefix, ())
  for option in options:
    if option not in allowed:
      raise ValueError(f'{name} takes no option {option!r}'
                       f'{nearest(option, allowed)}')
  if prefix == 'tfds:':
    # Slow to import, and needed for these sets alone.
    from peftjax.data.tfds_sets import open_tfds
    return open_tfds(rest, split, path, **options)
  if prefix == 'data:':
    return open_set(rest, split, path)
  if path:
    raise ValueError(f'path={path!r}: {name} has no folder to choose')
  if prefix == 'file:':
    return open_file(rest, split, **options)
  if name not in builders.NAMES:
    raise ValueError(f'unknown data set {name!r}{nearest(name, _names())}')
  return _own(name, split)


def _own(name, split):
  builder = builders.prepared(name)
  split_name(split, list(builder.info.splits), name)
  rows = builder.as_data_source(split)
  labels = tuple(builder.info.features['label'].names)
  full = f'{name} {split}'
  if not len(rows):
    raise ValueError(f'{full} is empty: expected at least one example')

  def get(i):
    return check_example(dict(rows[i]), 'image', labels, i, full)
  return Source(Examples(len(rows), get), 'image', labels, 'accuracy', full)


def _names():
  """All names that can be listed, for an error message."""
  from peftjax.data.tfds_sets import SETS
  names = [*builders.NAMES, *(f'tfds:{n}' for n in SETS)]
  try:
    names += [f'data:{n}' for n in set_names(find_folder())]
  except (FileNotFoundError, ValueError):
    pass  # No folder is given, which is no error of an unknown name.
  return names + ['file:PATH']
