"""Rules by which a study's claims are decided, fixed before its runs.

On seed-paired differences of the arms of a grid, averaged over tasks first, with
the 95 % t interval over seeds:

  SUP        shown if the interval lies on the better side of 0, contradicted if
             on the other
  NI(m)      shown if it lies above -m (for what is better the smaller: below m),
             contradicted if it lies wholly on the other side of that
  FEWER(f)   the second arm has more than f times as many numbers: exact; of
             several tasks and seeds, on that of the worst ratio
  FASTER(f)  the second arm's steps to the validation loss that its mean curve
             ends at, over the first's steps to the same loss; 0 where it is
             never reached. Shown above f, contradicted below 1

Where the two arms of a part do not share all tasks, those that they share
count, and the text says which.

A claim with several parts is shown if every part is, contradicted if any part
is, else not shown.
"""

from typing import NamedTuple

import numpy as np

from peftjax import report

# What is compared: (better: 1 the larger, -1 the smaller; factor; unit; digits).
KEYS = dict(
    score=(1, 100, 'points', 2), loss=(-1, 1, 'nats', 3),
    area=(-1, 1, 'nats', 3), early=(-1, 1, 'nats', 3),
    keep=(-1, 1, 'nats a token', 4), bits=(-1, 1, 'bits a byte', 4))


class Part(NamedTuple):
  rule: str  # 'SUP', 'NI', 'FEWER' or 'FASTER'
  arm: str
  other: str
  margin: float = 0.0  # in the unit of the key; of FEWER and FASTER the factor
  key: str = ''  # of the rows; '': score, of FEWER trained
  tasks: tuple[str, ...] = ()  # (): all


class Claim(NamedTuple):
  name: str
  paper: str
  parts: tuple[Part, ...]


def decide_part(part, rows):
  """(verdict, text) of one part.

  Raises:
    ValueError: rows that lack one of the arms, a seed of it, or the key.
  """
  rows = [r for r in rows if not part.tasks or r['task'] in part.tasks]
  every = {r['task'] for r in rows}
  both = set.intersection(*(
      {r['task'] for r in rows if r['arm'] == a} for a in (part.arm, part.other)))
  if both and both < every:  # the others are said
    verdict, text = decide_part(
        part, [r for r in rows if r['task'] in both])
    return verdict, f'{text}, on {", ".join(sorted(both))} alone'
  key = 'curve' if part.rule == 'FASTER' else part.key
  for arm in (part.arm, part.other):
    mine = [r for r in rows if r['arm'] == arm]
    if not mine:
      raise ValueError(f'no rows of arm {arm!r}; there are '
                       f'{sorted({r["arm"] for r in rows})}')
    if key and not all(key in r for r in mine):
      raise ValueError(f'rows of arm {arm!r} without {key!r}')
  if part.rule == 'FEWER':
    return _fewer(part, rows)
  if part.rule == 'FASTER':
    return _faster(part, rows)
  sign, factor, unit, digits = KEYS[part.key or 'score']
  mean, low, high, n = report.paired(
      rows, part.arm, part.other, part.key or 'score')
  mean, low, high = factor * mean, factor * low, factor * high
  worst, best = (low, high) if sign > 0 else (-high, -low)
  verdict = _verdict(worst > -part.margin, best < -part.margin)
  rule = part.rule if part.rule == 'SUP' else f'NI({part.margin:g})'
  what = '' if not part.key else f' {part.key}'
  show = lambda v: f'{v:+.{digits}f}'
  return verdict, (f'{rule} {part.arm} - {part.other}{what}: {show(mean)} {unit} '
                   f'[{show(low)}, {show(high)}], {n} seeds')


def _verdict(shown, contradicted):
  return 'shown' if shown else 'contradicted' if contradicted else 'not shown'


def _fewer(part, rows):
  size = {}  # of every task and seed: ranks that a run has found differ
  for row in rows:
    size.setdefault((row['task'], row['seed']), {})[row['arm']] = row[
        part.key or 'trained']
  mine, other = max(
      ((of[part.arm], of[part.other]) for of in size.values()
       if part.arm in of and part.other in of),
      key=lambda pair: pair[0] / pair[1])
  bar = part.margin or 1
  times = f', {other / mine:.0f} times' if part.margin else ''
  verdict = 'shown' if bar * mine < other else 'contradicted'
  return verdict, f'{part.arm} {mine:,} against {part.other} {other:,}{times}'


def steps_to(curve, loss):
  """Step at which a curve {step: loss} first is at a loss; inf: never."""
  steps = sorted(curve, key=int)
  for before, step in zip([None, *steps], steps):
    if curve[step] <= loss:
      if before is None:
        return float(step)
      a, b = curve[before], curve[step]
      return int(before) + (int(step) - int(before)) * (a - loss) / (a - b)
  return float('inf')


def speed_up(rows, arm, other):
  """[by how much `arm` is faster, a seed]; see FASTER above."""
  by_seed = {}
  for task in dict.fromkeys(r['task'] for r in rows):
    curves = {a: {r['seed']: r['curve'] for r in rows
                  if r['arm'] == a and r['task'] == task}
              for a in (arm, other)}
    mean = {step: np.mean([c[step] for c in curves[other].values()])
            for step in next(iter(curves[other].values()))}
    goal = mean[max(mean, key=int)]
    for seed, curve in curves[arm].items():
      by_seed.setdefault(seed, []).append(
          steps_to(mean, goal) / steps_to(curve, goal))
  return [float(np.mean(v)) for v in by_seed.values()]


def _faster(part, rows):
  found = speed_up(rows, part.arm, part.other)
  mean, width = report.interval(found)
  verdict = _verdict(mean - width > part.margin, mean + width < 1)
  return verdict, (f'FASTER({part.margin:g}) {part.arm} than {part.other}: '
                   f'{mean:.2f} times [{mean - width:.2f}, {mean + width:.2f}], '
                   f'{len(found)} seeds')


def decide(claim, rows):
  """(verdict, [text of a part]) of a claim."""
  verdicts, texts = [], []
  for part in claim.parts:
    verdict, text = decide_part(part, rows)
    verdicts.append(verdict)
    texts.append(f'{text}: {verdict}')
  if 'contradicted' in verdicts:
    return 'contradicted', texts
  return ('shown' if set(verdicts) == {'shown'} else 'not shown'), texts


def table(claims, rows):
  """Lines of `report.markdown`, one a claim that the rows have all arms of."""
  lines = []
  for claim in claims:
    try:
      verdict, texts = decide(claim, rows)
    except ValueError as e:
      verdict, texts = 'not measured', [str(e)]
    lines.append({'claim': claim.name, 'the paper': claim.paper,
                  'here': '<br>'.join(texts), 'verdict': f'**{verdict}**'})
  return lines
