"""The command `python -m peftjax.analysis`; see the package's docstring."""

import json

from absl import app
from absl import flags
import numpy as np

from peftjax import analysis
from peftjax.report import markdown


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    report = analysis.analyse(_ADAPTER.value, _WEIGHTS.value, _TOP.value,
                              _EPS.value, _NEAR.value, _P.value)
    if _OUT.value:
      with open(_OUT.value, 'w', encoding='utf-8') as f:
        json.dump(report, f, indent=1, default=_plain)
        f.write('\n')
  except (OSError, ValueError) as e:
    raise SystemExit(f'analysis: {e}') from e
  print(markdown(analysis.lines(report)), end='')
  rows = report['kernels'].values()
  print(f'{", ".join(report["methods"])} on {report["base"]}: '
        f'{sum(r["intruders"]["intruders"] for r in rows)} intruders in '
        f'{len(rows)} kernels; {len(report["unchanged"])} further kernels are '
        "the base's")


def _plain(value):
  """Arrays as lists, to the digits that float32 has."""
  if isinstance(value, np.ndarray):
    return [float(f'{v:.7g}') for v in value]
  raise TypeError(f'{value!r} is no JSON value')


if __name__ == '__main__':
  _ADAPTER = flags.DEFINE_string(
      'adapter', None, 'Folder that save_adapter wrote.', required=True)
  _WEIGHTS = flags.DEFINE_string(
      'weights', None, 'Name or path of the base, if not as the adapter says.')
  _OUT = flags.DEFINE_string(
      'out', None, 'JSON file to write, with cosines and spectra.')
  _TOP = flags.DEFINE_integer('top', 10, 'Directions of a kernel to look at.')
  _EPS = flags.DEFINE_float('eps', 0.5, 'Cosines below this are intruders.')
  _NEAR = flags.DEFINE_float(
      'near', 0.05, 'Singular values this near make a subspace.')
  _P = flags.DEFINE_float('p', 0.9, 'Share of squares of the effective rank.')
  app.run(main)
