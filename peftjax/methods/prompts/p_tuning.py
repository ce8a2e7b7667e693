"""P-tuning: a prompt that a small network makes of trained vectors.

Source: "GPT Understands, Too" (arXiv 2103.10385).

  Z = embedding                                     [P, d]
  prompt = relu(relu(Z W1 + b1) W2 + b2) W3 + b3    [P, d]
           W1 [d, h], W2 [h, h], W3 [h, d]
  X' = prompt || E[ids]                             as in prompt tuning

The network runs once a step, whatever the batch. After training its output is
all that matters: it is the prompt of `prompts.prompt_tuning`.

Init: torch's, as in Hugging Face PEFT: Z ~ N(0, 1), weights and biases of a
layer with n inputs U(-1/sqrt(n), 1/sqrt(n)). It does not start as the base.

Count: P d + (d + 1) h + (h + 1) h + (h + 1) d in all.

Paper and code: the paper puts a bidirectional LSTM before a perceptron of two
layers, and may place prompts between parts of a template; PEFT's default, and
what is here, is the perceptron of three layers, in front. The LSTM is refused.
"""

import jax

from peftjax.method import Method, nearest
from peftjax.ops import prompts

EXAMPLE = dict(length=3, hidden=4)
ENCODERS = ('mlp', 'lstm')


def p_tuning(length=20, hidden=None, encoder='mlp',
             sites=prompts.model_of_text):
  """P-tuning.

  Args:
    length: P, 1 to 65536.
    hidden: h, 1 to 65536; None: d.
    encoder: The network, 'mlp'.
    sites: Predicate on sites; by default the model, which embeds token ids.

  Raises:
    ValueError: a length or hidden below 1, another encoder than 'mlp', a site
      that does not embed token ids.
  """
  prompts.check_size('p_tuning', 'length', length)
  if hidden is not None:
    prompts.check_size('p_tuning', 'hidden', hidden)
  if encoder == 'lstm':
    raise ValueError("p_tuning: encoder='lstm' is not implemented; use 'mlp', "
                     'the default of Hugging Face PEFT')
  if encoder not in ENCODERS:
    raise ValueError(f'p_tuning: encoder={encoder!r}'
                     f'{nearest(encoder, ("mlp",))}')

  def sizes(site):
    d = prompts.width('p_tuning', site)
    return d, d if hidden is None else hidden

  def check(found):
    for site in found.values():
      sizes(site)

  def init(key, site, p, stats):
    del p, stats
    d, h = sizes(site)
    keys = jax.random.split(key, 4)
    t = dict(embedding=jax.random.normal(keys[0], (length, d)))
    for i, dims in enumerate(((d, h), (h, h), (h, d)), 1):
      t[f'w{i}'], t[f'b{i}'] = prompts.linear(keys[i], *dims)
    return t

  def prepare(t, ctx):
    del ctx
    z = jax.nn.relu(t['embedding'] @ t['w1'] + t['b1'])
    z = jax.nn.relu(z @ t['w2'] + t['b2'])
    return dict(prompt=z @ t['w3'] + t['b3'])

  def layer(f, x, t, ctx):
    del ctx
    return prompts.in_front(t['prompt'], f(x))

  def count(site):
    d, h = sizes(site)
    return length * d + (d + 1) * h + (h + 1) * h + (h + 1) * d

  return Method('p_tuning', sites, init, prepare, layer=layer, on='embed',
                check=check, count=count, tolerance=float('inf'))
