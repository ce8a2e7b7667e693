"""The command of a bank; see `peftjax.bank`."""

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_flags

from peftjax.bank import members as members_lib
from peftjax.bank import train


def _numbers(name, given, kind):
  try:
    return [kind(v) for v in given or ()]
  except ValueError as e:
    raise ValueError(f'--{name}={",".join(given)}: expected {kind.__name__}s '
                     f'with commas between them') from e


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    members = members_lib.product(
        members_lib.read(_MEMBERS.value) if _MEMBERS.value else None,
        _numbers('seeds', _SEEDS.value, int),
        _numbers('lrs', _LRS.value, float))
    out = train(_CONFIG.value, members, _WORKDIR.value)
  except (OSError, ValueError) as e:
    logging.debug('where it was raised', exc_info=True)  # with --verbosity=1
    raise SystemExit(f'bank: {e}') from e
  failed = [n for n, s in out.items() if n != 'stopped_at' and 'error' in s]
  if failed:
    raise SystemExit(f'bank: {len(failed)} of {len(out)} members stopped: '
                     f'{", ".join(failed)}; see their summary.json')


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file(
      'config', None, 'Config file.', lock_config=True)
  _WORKDIR = flags.DEFINE_string(
      'workdir', None, 'Folder to work in.', required=True)
  _SEEDS = flags.DEFINE_list('seeds', None, 'Seeds of members.')
  _LRS = flags.DEFINE_list('lrs', None, 'Learning rates of members.')
  _MEMBERS = flags.DEFINE_string(
      'members', None, 'JSON file of members, [{config key: value}].')
  flags.mark_flag_as_required('config')
  app.run(main)
