"""Writes an adapter for other libraries.

  python -m peftjax.export --adapter=DIR --base=BASE --format=peft --out=OUT

  peft     adapter_config.json and adapter_model.safetensors, which
           PeftModel.from_pretrained and vLLM's --lora-modules open
  lora     the same, as the nearest LoRA of --rank, whatever the method was; what
           is lost is told for each site and in total
  merged   the folded model in Hugging Face's layout

BASE is a folder in Hugging Face's layout or a hub id; by default what the
adapter says. Nothing is written unless all of it can be.
"""

import json

from absl import app
from absl import flags

from peftjax.fold import fold_adapter
from peftjax.interop.peft.as_lora import export_lora
from peftjax.interop.peft.writing import export_adapter

FORMATS = ('peft', 'lora', 'merged')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}; see --help')
  adapter, out, base = _ADAPTER.value, _OUT.value, _BASE.value
  try:
    if _FORMAT.value == 'merged':
      report = fold_adapter(adapter, out, base)
    elif _FORMAT.value == 'lora':
      report = export_lora(adapter, out, _RANK.value, base, _HEAD.value,
                           _TRANSFORMERS.value)
    else:
      report = export_adapter(
          adapter, out, base, _HEAD.value, _TRANSFORMERS.value)
  except (OSError, ValueError) as e:
    raise SystemExit(f'export: {e}') from e
  print(json.dumps(report, indent=1))


if __name__ == '__main__':
  _ADAPTER = flags.DEFINE_string(
      'adapter', None, 'Folder that save_adapter wrote.', required=True)
  _BASE = flags.DEFINE_string(
      'base', None, 'Folder or hub id of the base, if not as the adapter says.')
  _FORMAT = flags.DEFINE_enum('format', 'peft', FORMATS, 'What to write.')
  _OUT = flags.DEFINE_string('out', None, 'Folder to make.', required=True)
  _RANK = flags.DEFINE_integer(
      'rank', 16, 'Largest rank of a site, with --format=lora.', lower_bound=1)
  _HEAD = flags.DEFINE_enum(
      'head', 'keep', ('keep', 'drop'),
      "'drop' leaves a head out that no class of transformers has.")
  _TRANSFORMERS = flags.DEFINE_integer(
      'transformers', 5, 'Major version whose module names are written.',
      lower_bound=4, upper_bound=5)
  app.run(main)
