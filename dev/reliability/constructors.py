# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random arguments of layers and backbones: refused in words, or the module computes.

python dev/reliability/constructors.py [--cases 2000] [--seconds 3600]
"""

from __future__ import annotations

import inspect
import math
import random
import sys
import warnings
from typing import Any

import numpy as np
import torch
from cases import parser, run
from mmengine.registry import MODELS

import mmdcnv4.registration  # noqa: F401  registers the classes
from mmdcnv4.ops import DCNv4

# what is legal for some argument, and what is for none
POOL: list[Any] = [
    None, True, False, 0, 1, 2, 3, 4, 8, 16, -1, -3, 1024, 2**31, 0.0, 0.5, 1.0, 1.5, -0.5, 1e-6,
    math.nan, math.inf, -math.inf, '', 'abc', 'GELU', 'LN', 'linear', 'uniform', 'DCNv4', b'x',
    (), [], (1,), (1, 2), [1, 1], (3, 3), (0, 1, 2, 3), [3, 1], (1, 1, 1, 1), (1, 2, 4, 8),
    (1, 1, 2, 1), [None] * 4, ['a'] * 4, {}, dict(type='LN'), dict(type='GELU'), dict(type='BN'),
    dict(type='Pretrained'), dict(checkpoint='x'), dict(type='abc'), object, np.int64(2),
    np.float32(0.5), np.array([1, 2]), torch.tensor(3), torch.ones(2), range(3), 1j]
SMALL = dict(depths=(1, 1, 1, 1), drop_path_rate=0.0)
BASES: dict[str, dict] = {
    'module': dict(channels=16, group=1),
    'DCNv4': dict(in_channels=8, out_channels=16, kernel_size=3, padding=1),
    'ChannelLN': dict(num_features=16),
    'FlashInternImage': dict(channels=16, groups=(1, 2, 4, 8), **SMALL),
    'InternImage': dict(channels=16, groups=(1, 2, 4, 8), dw_kernel_size=3, **SMALL),
    'DAT': dict(channels=16, heads=(1, 2, 4, 8), groups=(1, 1, 2, 4), img_size=64,
                blocks=('D', 'N', 'ND', 'D'), drop_path_rate=0.0),
    'DynamicMobileFormer': dict(
        stem_channels=(8, 12, 8), stages=(((16, 12, 2),), ((20, 16, 2),), ((32, 20, 4),
                                                                           (24, 20, 2)),
                                          ((40, 24, 4),)),
        groups=2, num_tokens=3, token_channels=32, num_kernels=3, drop_path_rate=0.0),
}


def kind_of(name: str) -> Any:
    """The class that a config names."""
    return DCNv4 if name == 'module' else MODELS.get(name)


def is_in_words(error: Exception, kind: Any, names: list[str]) -> bool:
    """Whether an error is ours and names one of the arguments."""
    text = str(error)
    return isinstance(error, (TypeError, ValueError, KeyError, FileNotFoundError)) and any(
        name in text for name in names) and (' must ' in text or 'no argument' in text
                                             or 'unexpected keyword' in text or 'got' in text)


def case(draw: random.Random) -> str:
    """One set of arguments."""
    name = draw.choice([name for name in BASES if name == 'module' or kind_of(name) is not None])
    kind = kind_of(name)
    known = [parameter.name for parameter in inspect.signature(kind.__init__).parameters.values()
             if parameter.name not in ('self', 'kwargs', 'args')]
    options = dict(BASES[name])
    changed = draw.sample(known, min(len(known), draw.choice([1, 1, 1, 2, 3])))
    if draw.random() < 0.03:
        changed.append('no_such_argument')
    for argument in changed:
        options[argument] = draw.choice(POOL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            module = kind(**options)
    except Exception as error:
        if 'allocate memory' in str(error):
            return f'{name} larger than memory'
        names = changed + ['group', 'kernel_size', 'channels', 'stride', 'pad', 'image', 'arch']
        assert is_in_words(error, kind, names), \
            f'{name}({ {key: options[key] for key in changed} }): {type(error).__name__}: {error}'
        return f'{name} refused'
    size = sum(parameter.numel() for parameter in module.parameters())
    if size > 2**24:
        return f'{name} built, large'
    width = options.get('in_channels') or options.get('num_features') or options.get('channels')
    image = torch.randn(1, 3, 64, 64)
    if name in ('module', 'DCNv4', 'ChannelLN'):
        width = getattr(module, 'in_channels', None) or getattr(module, 'num_features', width)
        image = torch.randn(1, 9, 9, int(width)) if name == 'module' else \
            torch.randn(1, int(width), 9, 9)
    elif getattr(module, 'in_channels', 3) != 3 or options.get('in_channels', 3) != 3:
        image = torch.randn(1, int(options['in_channels']), 64, 64)
    try:
        with torch.no_grad():
            out = module.eval()(image)
    except ValueError as error:
        assert ' must ' in str(error), f'{name}({options}): {error}'
        return f'{name} built, does not fit the map'
    outs = out if isinstance(out, (tuple, list)) else [out]
    assert all(isinstance(tensor, torch.Tensor) for tensor in outs)
    assert all(tensor.isfinite().all() for tensor in outs), f'{name}({options}): not finite'
    return f'{name} computes'


if __name__ == '__main__':
    sys.exit(min(run('constructors', case, parser('Arguments of constructors.', 2000).parse_args()),
                 1))
