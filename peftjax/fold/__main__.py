"""The command `python -m peftjax.fold`; see the package's docstring."""

from absl import app
from absl import flags

from peftjax.fold import BATCH, fold_adapter

_ADAPTER = flags.DEFINE_string(
    'adapter', None, 'Folder that save_adapter wrote.', required=True)
_OUT = flags.DEFINE_string(
    'out', None, "File to write, '*.safetensors'; for a base that is a folder, a "
    'folder.', required=True)
_WEIGHTS = flags.DEFINE_string(
    'weights', None, 'Name or path of the base, if not what the adapter says.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    report = fold_adapter(_ADAPTER.value, _OUT.value, _WEIGHTS.value)
  except (OSError, ValueError) as e:
    raise SystemExit(f'fold: {e}') from e
  print(f'folded {", ".join(report["methods"])} into {report["out"]}\n'
        'largest difference between folded and adapted outputs on '
        f'{BATCH} examples ({report["inputs"]}): {report["max_abs"]:.3g}, or '
        f'{report["max_ulp"]:.1f} units in the last place of '
        f'{report["largest"]:.4g}')


if __name__ == '__main__':
  app.run(main)
