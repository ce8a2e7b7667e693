"""Reads an adapter of another library and writes one of this one.

  python -m peftjax.convert --from=peft --adapter=DIR --base=BASE --out=OUT

DIR holds adapter_config.json and adapter_model.safetensors. BASE is a folder in
Hugging Face's layout, a hub id or a packaged name; by default what the adapter
says. OUT can be folded, judged and exported, and training goes on from it:

  python -m peftjax.train --config=... --config.start=OUT --workdir=...
"""

import json

from absl import app
from absl import flags

from peftjax.interop.peft.reading import convert_adapter


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  try:
    report = convert_adapter(
        _ADAPTER.value, _OUT.value, _BASE.value, scan=_SCAN.value)
  except (OSError, ValueError) as e:
    raise SystemExit(f'convert: {e}') from e
  print(json.dumps(report, indent=1))


if __name__ == '__main__':
  _FROM = flags.DEFINE_enum('from', 'peft', ('peft',), 'Whose adapter it is.')
  _ADAPTER = flags.DEFINE_string(
      'adapter', None, 'Folder of the adapter.', required=True)
  _BASE = flags.DEFINE_string(
      'base', None, 'Its base, if not as the adapter says.')
  _OUT = flags.DEFINE_string('out', None, 'Folder to make.', required=True)
  _SCAN = flags.DEFINE_bool(
      'scan', False, 'For the scanned form of the base.')
  app.run(main)
