"""Writes the sample sets that `:runlocal` configs read: tiny, made up, free.

  python -m experiments.samples.make

They only show that a config runs: nothing can be learnt from them that matters.
"""

import json
import os

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
SIZES = dict(train=64, validation=32, test=32)
GOOD = ('bright', 'lovely', 'warm', 'happy')
BAD = ('dull', 'nasty', 'cold', 'sad')
THINGS = ('ball', 'garden', 'dog', 'story', 'box', 'tree')
NAMES = ('Lily', 'Tom', 'Anna', 'Ben')
PLACES = ('London', 'Rome', 'Oslo')


def pick(rng, choices):
  return choices[rng.randint(len(choices))]


def single(rng):
  label = rng.randint(2)
  return dict(text=f'The {pick(rng, THINGS)} was '
              f'{pick(rng, GOOD if label else BAD)}.', label=int(label))


def pair(rng):
  label, thing = rng.randint(2), pick(rng, THINGS)
  other = thing if label else pick(rng, [t for t in THINGS if t != thing])
  return dict(text=f'{pick(rng, NAMES)} saw a {thing}.',
              text_b=f'There was a {other}.', label=int(label))


def regression(rng):
  score = round(float(rng.uniform(0, 5)), 1)
  return dict(text=f'The {pick(rng, THINGS)} fell down.',
              text_b=f'The {pick(rng, THINGS)} fell {score} times.',
              label=score)


def tagging(rng):
  words = [pick(rng, NAMES), 'went', 'to', pick(rng, PLACES), '.']
  return dict(tokens=words, tags=['B-PER', 'O', 'O', 'B-LOC', 'O'])


def e2e(rng):
  name, food, near = pick(rng, NAMES), pick(rng, THINGS), pick(rng, PLACES)
  target = f'{name} sells a {food} near {near}.'
  return dict(source=f'name : {name} | food : {food} | near : {near}',
              target=target, references=[target, f'Near {near}, {name} sells '
                                         f'a {food}.'])


def main():
  for make in (single, pair, regression, tagging, e2e):
    rng = np.random.RandomState(0)
    folder = os.path.join(FOLDER, make.__name__)
    os.makedirs(folder, exist_ok=True)
    for split, n in SIZES.items():
      with open(os.path.join(folder, f'{split}.jsonl'), 'w',
                encoding='utf-8') as f:
        f.writelines(json.dumps(make(rng)) + '\n' for _ in range(n))


if __name__ == '__main__':
  main()
