"""COFT: OFT whose rotations stay within a radius of the identity.

Source: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv
2306.07280), the constrained form.

  y = (x R) K + b             as `orthogonal.oft`: init, count, fold too
  after every update, per block of Q:
    Q_i <- Q_i min(1, eps_b / ||Q_i||_F),   eps_b = eps / sqrt(stored blocks)

So ||Q||_F <= eps over the whole rotation, and since R is about I + 2 Q near 0,
||R - I||_F is at most about 2 eps, to be read against ||I||_F = sqrt(d_in).

Count: d_in (B - 1) / 2 a kernel; B (B - 1) / 2 if shared.

Where sources differ:
  The paper bounds ||R - I|| and enforces it through Q, as here.
  eps. Hugging Face PEFT has the eps_b above, and its default of 6e-5 hardly
    lets the model move. The paper's code has eps_b = eps B^2 / sqrt(n), or
    eps B^2 if blocks are shared, and takes the norm of the unsymmetrised
    parameter: its 6e-5 at B = 80 is an eps of 0.38 here. The default here is in
    that range.
  When. They project before each forward pass, here after each update; the
    models that are trained and saved are the same, since q = 0 is inside.
  Momentum of the optimiser is not projected, as in both.
"""

import math

from peftjax import sites as sites_lib
from peftjax.methods.orthogonal.oft import oft
from peftjax.ops import orthogonal

EXAMPLE = dict(eps=0.5, block_size=4)


def coft(eps=0.5, block_size=None, blocks=None, shared=False, cayley='exact',
         terms=5, block_dropout=0.0, sites=sites_lib.kernels):
  """COFT.

  Args:
    eps: Largest Frobenius norm of a kernel's stored skew blocks together; inf
      is OFT, 0 keeps the base model.
    block_size: As for `oft`, like all that follow.
    blocks: Number of blocks instead of their size.
    shared: Whether all blocks of a kernel are one and the same.
    cayley: 'exact' or 'neumann'.
    terms: Terms of the Neumann series, from 1 to 64.
    block_dropout: Share of the blocks set to the identity while training.
    sites: Predicate on sites; by default every kernel but the head.

  Raises:
    ValueError: a negative eps, or what `oft` refuses.
  """
  if not eps >= 0:
    raise ValueError(f'eps={eps}: expected a radius of at least 0; the nearest '
                     'is 0.0, which keeps the base model')

  def after_step(theta):
    def project(q):
      return orthogonal.project_ball(q, eps / math.sqrt(q.shape[-2]))
    return {path: {**t, 'q': project(t['q'])} for path, t in theta.items()}

  return oft(block_size, blocks, shared, cayley, terms, block_dropout,
             sites)._replace(name='coft', after_step=after_step)
