# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws what one or several training runs logged, over iterations.

python tools/analysis_tools/plot_curves.py WORK_DIR [WORK_DIR ...] --out curves.png \
    --panel loss --panel mIoU

Every `--panel` is one diagram; the entries in one panel share it. The newest run in each work
directory is read, and the last value of every curve is printed, or those after the iterations
`--at`. Runs that `--names` gives one name, such as the seeds of a config, are drawn as their mean
between the least and the largest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from mmdcnv4.cli.explain import explain
from mmdcnv4.cli.preflight import PICTURE_ENDINGS, check_file
from mmdcnv4.errors import UserError


class Curve(NamedTuple):
    """(iteration, value) points of one logged entry, and whether it was logged while training."""

    points: list[tuple[int, float]]
    is_training: bool


def newest_log(work_dir: Path) -> Path:
    """The scalars that MMEngine logged last in a work directory."""
    files = list(work_dir.glob('*/vis_data/scalars.json'))
    if not files:
        raise UserError(f'there is no */vis_data/scalars.json in {work_dir}')
    return max(files, key=lambda file: file.stat().st_mtime)


def read_curve(scalars: Path, key: str) -> Curve:
    """The values of `key`. A validation after an epoch stands at the last training record."""
    points, iteration, is_training, by_epoch = [], 0, False, False
    for line in scalars.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f'{scalars} must hold one record per line, got {line!r}') from error
        by_epoch = by_epoch or 'epoch' in record
        if 'loss' in record or not by_epoch:  # else the step is an epoch
            iteration = record['step']
        if key in record:
            points.append((iteration, record[key]))
            is_training = 'loss' in record
    if not points:
        raise UserError(f'{scalars} has no entry {key}')
    return Curve(points, is_training)


def merge(curves: list[Curve]) -> dict[int, list[float]]:
    """The values of all runs of a name, for the iterations that all of them logged."""
    shared = set.intersection(*({step for step, _ in curve.points} for curve in curves))
    values = [dict(curve.points) for curve in curves]
    return {step: [value[step] for value in values] for step in sorted(shared)}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw the curves of training runs.')
    parser.add_argument('work_dirs', type=Path, nargs='+', help='work directories of the runs')
    parser.add_argument('--panel', nargs='+', action='append', metavar='ENTRY', dest='panels',
                        help='entries of one diagram, e.g. loss, or mIoU')
    parser.add_argument('--names', nargs='+', help='of the runs; default: those of the folders')
    parser.add_argument('--at', type=int, nargs='+', metavar='ITERATION',
                        help='print the values after these; default: the last one')
    parser.add_argument('--out', type=Path, required=True, help='picture to write')
    parser.add_argument('--debug', action='store_true', help='show the traceback of every error')
    args = parser.parse_args(argv)
    args.panels = args.panels or [['loss']]
    args.names = args.names or [folder.name for folder in args.work_dirs]
    if len(args.names) != len(args.work_dirs):
        parser.error(f'--names takes one name per run, {len(args.work_dirs)}, '
                     f'got {len(args.names)}')
    return args


def report(name: str, key: str, values: dict[int, list[float]], at: Sequence[int]) -> None:
    """Prints the values after some iterations, of several runs as mean, least and largest."""
    for step in at:
        if step not in values:
            near = min(values, key=lambda other: abs(other - step))
            raise UserError(f'--at must be iterations at which {name} logged {key}, got {step}; '
                            f'the nearest is {near}')
        runs = values[step]
        spread = f' ({min(runs):.4g} to {max(runs):.4g}, {len(runs)} runs)' * (len(runs) > 1)
        print(f'{name}: {key} {statistics.fmean(runs):.4g}{spread} after {step} iterations')


def draw(args: argparse.Namespace) -> None:
    """Draws one diagram per panel."""
    figure, panels = plt.subplots(1, len(args.panels), figsize=(5.5 * len(args.panels), 4),
                                  squeeze=False, layout='constrained')
    names = list(dict.fromkeys(args.names))
    for axes, keys in zip(panels[0], args.panels):
        for name, key in itertools.product(names, keys):
            curves = [read_curve(newest_log(folder), key)
                      for folder, other in zip(args.work_dirs, args.names) if other == name]
            values = merge(curves)
            if not values:
                raise UserError(f'the runs named {name} logged {key} at no common iteration')
            steps, means = list(values), [statistics.fmean(runs) for runs in values.values()]
            label = ' '.join([name] * (len(names) > 1) + [key] * (len(keys) > 1)) or key
            line, = axes.plot(steps, means, label=label, linewidth=1.2,
                              marker='' if curves[0].is_training else 'o')
            if len(curves) > 1:
                axes.fill_between(steps, [min(runs) for runs in values.values()],
                                  [max(runs) for runs in values.values()],
                                  color=line.get_color(), alpha=0.15, linewidth=0)
            report(name, key, values, args.at or steps[-1:])
        axes.set(xlabel='iteration', ylabel=', '.join(keys))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out, dpi=110)
    plt.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws, and prints the last values."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        check_file(str(args.out), '--out', PICTURE_ENDINGS)
        draw(args)


if __name__ == '__main__':
    main()
