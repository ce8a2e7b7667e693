"""Progress of long work: a bar in a terminal, plain lines elsewhere."""

import contextlib

import rich.console
import rich.progress


@contextlib.contextmanager
def reporter(total, done=0, show=True):
  """Yields (advance(step), say(text)).

  Args:
    total: Steps of the whole work.
    done: Steps done before.
    show: False keeps silent.
  """
  console = rich.console.Console(highlight=False, soft_wrap=True, markup=False)
  if not show:
    yield (lambda step: None), (lambda text: None)
  elif not console.is_terminal:
    yield (lambda step: None), lambda text: print(text, flush=True)
  else:
    columns = (
        rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn())
    with rich.progress.Progress(*columns, console=console) as bar:
      task = bar.add_task('steps', total=total, completed=done)
      yield (lambda step: bar.update(task, completed=step)), console.print
