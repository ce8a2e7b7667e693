"""TPU slices by name, and compiling for them where there is no TPU.

libtpu, the compiler of the `[tpu]` extra, compiles for chips that are not
there: `prepare` sets what it needs before jax makes its first device, `devices`
gives the devices of a slice such as 'v5e:4x4'.
"""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from peftjax.method import nearest


class Chip(NamedTuple):
  """One kind of TPU.

  Attributes:
    hbm: GiB of memory of one device, as the vendor says.
    usable: GiB of it that programs may use.
    axes: Of the grid that its slices are: 2 or 3.
    accelerator: What a slice of n chips is called, with {n} or {cores}.
    per_chip: Devices that jax sees of one chip.
    options: Of `get_topology_desc`.
  """

  hbm: float
  usable: float
  axes: int
  accelerator: str
  per_chip: int = 1
  options: dict = {}


# hbm: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x. usable: what
# libtpu 0.0.52 names as available when a program is too large.
CHIPS = dict(
    v4=Chip(32, 30.75, 3, 'v4-{cores}',
            options=dict(chip_config_name='megacore')),
    v5e=Chip(16, 15.75, 2, 'v5litepod-{n}'),
    v5p=Chip(95, 95.73, 3, 'v5p-{cores}'),
    v6e=Chip(32, 31.24, 2, 'v6e-{n}'),
    tpu7x=Chip(96, 94.74, 3, 'tpu7x-{cores}', per_chip=2))  # 192 GiB a chip

GRIDS = {
    2: ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
    3: ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8',
        '8x8x16', '8x16x16')}

INSTALL = ("compiling for TPUs needs libtpu, which is not installed: pip "
           "install 'peftjax[tpu]'; it needs no TPU")


def parse(name):
  """'v5e:4x4' -> (Chip, devices jax sees); a ValueError for unknown slices."""
  kind, _, grid = name.partition(':')
  if kind not in CHIPS:
    known = [f'{k}:{GRIDS[c.axes][3]}' for k, c in CHIPS.items()]
    raise ValueError(f'topology={name!r}: unknown kind of TPU {kind!r}; '
                     f'expected one like {", ".join(known)}'
                     f'{nearest(kind, CHIPS)}')
  chip = CHIPS[kind]
  if grid not in GRIDS[chip.axes]:
    raise ValueError(f'topology={name!r}: there is no such slice of {kind}; '
                     f'expected one of {_near(grid, chip.axes, kind)}')
  return chip, chip.per_chip * math.prod(map(int, grid.split('x')))


def _near(grid, axes, kind):
  """The slices of about as many chips as `grid` seems to ask for."""
  n = max(1, math.prod(int(v) for v in re.findall(r'\d+', grid)[:axes]))
  size = lambda g: math.prod(map(int, g.split('x')))
  found = sorted(GRIDS[axes], key=lambda g: abs(math.log(size(g) / n)))[:3]
  return ', '.join(f'{kind}:{g}' for g in sorted(found, key=size))


def installed():
  """Whether libtpu is there; it is not imported."""
  found = importlib.util.find_spec('libtpu')
  return found is not None and found.origin is not None  # not just a folder


def prepare(count, topology=''):
  """Sets the process up for `count` made-up devices; call it before any work.

  Args:
    count: CPU devices that jax is to see.
    topology: Slice that will be compiled for; '': none.
  """
  jax.config.update('jax_platforms', 'cpu')  # a chip that is here is not taken
  flag = '--xla_force_host_platform_device_count'
  others = [f for f in os.environ.get('XLA_FLAGS', '').split()
            if not f.startswith(flag)]
  os.environ['XLA_FLAGS'] = ' '.join([*others, f'{flag}={count}'])
  if topology:
    chip, n = parse(topology)
    # Otherwise libtpu asks the machine, or a server that may not be there, and
    # locks out all other processes that use it.
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'
    os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
    os.environ['TPU_ACCELERATOR_TYPE'] = chip.accelerator.format(
        n=n, cores=2 * n // chip.per_chip)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def devices(topology):
  """Devices of a slice that need not be there, after `prepare`.

  Raises:
    ValueError: an unknown slice.
    ImportError: libtpu is not installed.
  """
  chip, n = parse(topology)
  if not installed():
    raise ImportError(INSTALL)
  from jax.experimental import topologies  # only plans need it
  found = topologies.get_topology_desc(
      topology, platform='tpu', **chip.options).devices
  if len(found) != n:
    raise ValueError(f'topology={topology!r}: libtpu knows {len(found)} '
                     f'devices of it, expected {n}')
  return found
