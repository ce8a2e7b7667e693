"""The main job: a pretrained vision transformer adapted to images it never saw.

  make run          or    python -m experiments.quickstart.run --workdir=DIR

Adapts `vit_s` to Kuzushiji-MNIST (10 classes of handwritten Japanese, 800
training images) with LoRA, and beside it trains the linear probe and full
fine-tuning with the same steps and batches. Prints the three accuracies on the
2000 test images, the shares of trained parameters, how far the folded model is
from the adapted one, and where the artifact is. Running it again continues or
shows the finished runs. Measured result and wall time: README.md.
"""

import importlib
import json
import os
import time

from absl import app
from absl import flags
import rich
from rich import table as rich_table

from peftjax.fold import fold_adapter
from peftjax.train import train

ARMS = (('linear probe', 'linear_probe_kmnist'), ('LoRA', 'lora_kmnist'),
        ('full fine-tuning', 'full_kmnist'))


def run(workdir, arg=None):
  """Trains the three arms; returns {arm: summary} and the fold report."""
  summaries = {}
  for name, module in ARMS:
    config = importlib.import_module(
        f'experiments.quickstart.{module}').get_config(arg)
    rich.print(f'[bold]{name}[/bold] ({module}.py, {config.steps} steps)')
    summaries[name] = train(config, os.path.join(workdir, module))
  adapter = os.path.join(workdir, 'lora_kmnist', 'adapter')
  folded = os.path.join(workdir, 'lora_kmnist', 'folded.safetensors')
  return summaries, fold_adapter(adapter, folded), adapter, folded


def write(path, summaries, report, seconds):
  """What README.md shows of a run, for `python -m experiments.tables`."""
  keys = ('before', 'after', 'trained', 'steps_per_second', 'compile_seconds',
          'peak_bytes', 'versions')
  with open(path, 'w', encoding='utf-8') as f:
    json.dump(dict(
        arms={name: {k: s[k] for k in keys} for name, s in summaries.items()},
        fold={k: report[k] for k in ('max_abs', 'max_ulp')},
        seconds=round(seconds)), f, indent=1)
    f.write('\n')


def main(argv):
  del argv
  start = time.time()
  summaries, report, adapter, folded = run(_WORKDIR.value, _ARG.value)
  write(os.path.join(_WORKDIR.value, 'main.json'), summaries, report,
        time.time() - start)
  total = summaries['full fine-tuning']['trained']
  table = rich_table.Table(title='vit_s on Kuzushiji-MNIST, 2000 test images')
  for name in ('', 'accuracy before', 'accuracy after', 'trained parameters',
               'share', 'step'):
    table.add_column(name, justify='right' if name else 'left')
  for name, s in summaries.items():
    table.add_row(
        name, f'{100 * s["before"]["accuracy"]:.2f} %',
        f'{100 * s["after"]["accuracy"]:.2f} %', f'{s["trained"]:,}',
        f'{100 * s["trained"] / total:.2f} %',
        f'{1000 / s["steps_per_second"]:.0f} ms')
  rich.print(table)
  print(f'fold check: largest difference between folded and adapted outputs '
        f'{report["max_abs"]:.2e} ({report["max_ulp"]:.1f} units in the last '
        'place)')
  print(f'artifact: {adapter}\nfolded weights: {folded}\n'
        f'{time.time() - start:.0f} s in all')


if __name__ == '__main__':
  _WORKDIR = flags.DEFINE_string('workdir', 'runs/quickstart',
                                 'Where runs are kept.')
  _ARG = flags.DEFINE_string('arg', None, "Config argument, as 'runlocal'.")
  app.run(main)
