# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A warm-up counts iterations, and with accumulated gradients an update takes several."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.logging import print_log

from ..checks.config import type_name

_WARM_UPS = ('LinearLR', 'ConstantLR')


def _warm_ups(cfg: Config) -> Iterator[tuple[str, dict]]:
    """(dotted way, scheduler) of those at the start that count iterations and have an end."""
    schedulers = cfg.get('param_scheduler') or []
    named = {'param_scheduler': schedulers} if isinstance(schedulers, dict) else {
        f'param_scheduler.{index}': node for index, node in enumerate(schedulers)}
    yield from ((path, node) for path, node in named.items() if _is_warm_up(node))


def _is_warm_up(node: dict) -> bool:
    return (type_name(node) in _WARM_UPS and node.get('by_epoch', True) is False
            and not node.get('begin') and isinstance(node.get('end'), int))


def apply_accumulation(cfg: Config, scale_warm_up: bool) -> None:
    """Says how many updates a warm-up is where gradients are accumulated; or keeps their number.

    Args:
        cfg: its warm-up is changed if `scale_warm_up`, and what follows it in iterations begins
            where it ends.
        scale_warm_up: the warm-up was given for updates of one iteration each (`--scale-warm-up`).
    """
    count = int((cfg.get('optim_wrapper') or {}).get('accumulative_counts') or 1)
    if count == 1:
        return
    for path, node in _warm_ups(cfg):
        end = int(node['end'])
        if not scale_warm_up:
            print_log(f'optim_wrapper.accumulative_counts={count}: {path} counts iterations, and '
                      f'its {end} are {end // count} updates. If they were meant as updates, take '
                      f'--scale-warm-up, which makes them {end * count}', logger='current',
                      level=30)
            continue
        node['end'] = end * count
        for other in cfg.param_scheduler if isinstance(cfg.param_scheduler, list) else []:
            if other.get('by_epoch', True) is False and other.get('begin') == end:
                other['begin'] = end * count
        print_log(f'{path}.end is {end * count} iterations, which are {end} updates with '
                  f'optim_wrapper.accumulative_counts={count}', logger='current')
