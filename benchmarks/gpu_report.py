# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What `gpu.py` writes: JSON, tables, a summary, a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

OURS = ('ours', 'ours fast')
KEYS = ('shape', 'group_channels', 'dtype', 'offsets')


def microseconds(row: dict[str, Any], name: str, key: str = 'device_ms') -> Optional[float]:
    """A time of a candidate, or None where it has none."""
    time = row['peers'].get(name, {}).get(key, 0)
    return 1e3 * time if time > 0 else None  # backward is a difference: noise may exceed it


def mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    logarithms = [math.log(max(ratio, 1e-9)) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


class Report:
    """The result of a run: what it was run on, and a row for each problem and direction.

    Args:
        head: device, versions, `peers` (their names), `absent` (name -> why), bandwidth of a copy
            and time of a launch, state of the device.
        stem: path of the files, without suffix.
        rows: those of an earlier run.
    """

    def __init__(self, head: dict[str, Any], stem: Path, rows: Iterable[dict[str, Any]] = ()):
        self.head, self.stem, self.rows = head, stem, list(rows)

    @classmethod
    def resume(cls, path: Path, head: dict[str, Any]) -> Report:
        """Goes on with a file that a run wrote; refuses that of another device or torch."""
        report = json.loads(path.read_text())
        for key in ('device', 'torch'):
            if report[key] != head[key]:
                raise SystemExit(f'benchmarks/gpu.py: {path} has {key} {report[key]!r}, '
                                 f'here it is {head[key]!r}')
        return cls(head, path.with_suffix(''), report['rows'])

    def has(self, case: dict[str, Any]) -> bool:
        """Whether there are rows of a problem."""
        return any(all(row[key] == case[key] for key in KEYS) for row in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, with their floors, and writes the files anew."""
        for row in rows:
            row['floor_us'] = 1e6 * max(row['bytes'] / self.head['copy_bytes_per_second'],
                                        self.head['launch_seconds'])
        self.rows += rows
        self.write()

    def write(self) -> None:
        """JSON and tables; a file is whole at any time."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps(rounded(row)) for row in self.rows]
        head = json.dumps(self.head, indent=1)[:-len('\n}')]
        text = head + ',\n "rows": [\n' + ',\n'.join(rows) + '\n]}\n'
        tables = [*self.lines(), *map(self.line, self.rows), '',
                  'Host time: µs per call of a loop', self.columns(),
                  *(self.line(row, 'host_ms') for row in self.rows), '', *self.summary()]
        for suffix, content in (('.json', text), ('.txt', '\n'.join(tables) + '\n')):
            path = self.stem.with_suffix(suffix)
            fresh = path.with_suffix(suffix + '.new')
            fresh.write_text(content)
            fresh.replace(path)

    def lines(self) -> list[str]:
        """What stands above the table."""
        head = self.head
        return [f'{head["device"]}, torch {head["torch"]}, Python {head["python"]}, '
                f'copy {head["copy_bytes_per_second"] / 1e12:.2f} TB/s, '
                f'launch {1e6 * head["launch_seconds"]:.1f} µs; before: {head["state_before"]}',
                *(f'absent: {name}: {why}' for name, why in head['absent'].items()),
                'µs of device time; peers also as multiples of ours', self.columns()]

    def columns(self) -> str:
        """Names of the columns."""
        names = ' | '.join(f'{name:>22}' for name in self.head['peers'])
        return f'{"shape":>14} {"D":>3} {"dtype":>8} {"":2} {"":8} {"floor":>8} | {names} | spread'

    def line(self, row: dict[str, Any], key: str = 'device_ms') -> str:
        """One row as text."""
        cells = [f'{row["shape"]:>14} {row["group_channels"]:3} {row["dtype"]:>8} '
                 f'{row["offsets"]} {row["direction"]:8} {row["floor_us"]:8.1f}']
        own = microseconds(row, 'ours', key)
        for name in self.head['peers']:
            time = microseconds(row, name, key)
            if time is None:
                cells.append(f'{"error" if "error" in row["peers"].get(name, {}) else "-":>22}')
                continue
            text = f'{time:.1f}'
            if name == 'ours' and key == 'device_ms':
                text += f' ({100 * row["floor_us"] / time:.0f}% of floor)'
            elif name != 'ours' and own:
                text += f' ({time / own:.2f}x)'
            share = row['wrong_pixels'].get(name, 0)
            cells.append(f'{text + (f" WRONG {100 * share:.1f}%" if share else ""):>22}')
        spread = row['peers'].get('ours', {}).get('spread')
        cells.append('' if spread is None else f'{100 * spread:5.1f}%')
        return ' | '.join(cells)

    def summary(self) -> list[str]:
        """A line for each type, width, distribution and direction: means over the shapes."""
        parts: dict[tuple, list[dict[str, Any]]] = {}
        for row in self.rows:
            name = (row['dtype'], row['group_channels'], row['offsets'], row['direction'])
            parts.setdefault(name, []).append(row)
        lines = ['Summary: geometric means over the shapes; in brackets the smallest. Peers as '
                 'multiples of the faster of ours']
        for (dtype, depth, offsets, direction), rows in parts.items():
            texts = []
            for name in self.head['peers']:
                if name in OURS:
                    ratios = [row['floor_us'] / time for row in rows
                              if (time := microseconds(row, name))]
                    unit = '% of floor'
                else:
                    ratios = [time / best for row in rows if (time := microseconds(row, name))
                              and (best := fastest(row))]
                    unit = 'x'
                if ratios:
                    scale, digits = (100, 0) if name in OURS else (1, 1)
                    texts.append(f'{name} {scale * mean(ratios):.{digits}f}{unit} '
                                 f'({scale * min(ratios):.{digits}f})')
            lines.append(f'{dtype} {depth} {offsets} {direction}: {", ".join(texts)}')
        return lines

    def problems(self) -> list[str]:
        """What went wrong with our own kernels."""
        found = []
        for row in self.rows:
            where = ' '.join(str(row[key]) for key in (*KEYS, 'direction'))
            for name in OURS:
                if 'error' in row['peers'].get(name, {}):
                    found.append(f'{where}: {name}: {row["peers"][name]["error"]}')
                elif row['wrong_pixels'].get(name, 0) > 0:
                    found.append(f'{where}: {name}: wrong pixels')
        return found

    def is_right(self) -> bool:
        """Whether our kernels ran everywhere and passed the comparison."""
        return bool(self.rows) and not self.problems()

    def finish(self, left: int) -> list[str]:
        """Writes everything once more and the plot; returns the last lines to print."""
        self.write()
        drawn = self.draw()
        lines = ['', *self.summary(), *(f'FAILED {text}' for text in self.problems()[:10])]
        if left:
            lines.append(f'stopped in time: {left} problems are left for '
                         f'--resume {self.stem.with_suffix(".json")}')
        return [*lines, f'written: {self.stem}.json, .txt'
                + (', .png' if drawn else '; no plot without matplotlib')]

    def draw(self) -> bool:
        """Device time over the shapes, for the first width and distribution; needs matplotlib."""
        try:
            import matplotlib
            matplotlib.use('Agg')
            from matplotlib import pyplot
        except ImportError:
            return False
        if not self.rows:
            return False
        first = self.rows[0]
        chosen = [row for row in self.rows if row['group_channels'] == first['group_channels']
                  and row['offsets'] == first['offsets']]
        dtypes = list(dict.fromkeys(row['dtype'] for row in chosen))
        figure, axes = pyplot.subplots(2, len(dtypes), figsize=(6 * len(dtypes), 9), squeeze=False,
                                       sharex=True, layout='constrained')
        for line, direction in zip(axes, ('forward', 'backward')):
            for axis, dtype in zip(line, dtypes):
                draw_panel(axis, [row for row in chosen if row['dtype'] == dtype
                                  and row['direction'] == direction], self.head['peers'])
                axis.set(title=f'{direction}, {dtype}', yscale='log', ylabel='µs of device time')
        axes[0, 0].legend(fontsize=7)
        figure.suptitle(f'{self.head["device"]}, groups of {first["group_channels"]} channels, '
                        f'offsets {first["offsets"]}')
        figure.savefig(self.stem.with_suffix('.png'), dpi=100)
        pyplot.close(figure)
        return True


def fastest(row: dict[str, Any]) -> Optional[float]:
    """The better of our two times."""
    times = [time for name in OURS if (time := microseconds(row, name))]
    return min(times, default=None)


def draw_panel(axis: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    """Times of the candidates, and the floor, over the rows."""
    axis.plot([row['floor_us'] for row in rows], color='black', linestyle=':', label='floor')
    for number, name in enumerate(names):  # one colour in every panel
        points = [(i, time) for i, row in enumerate(rows) if (time := microseconds(row, name))]
        if points:
            axis.plot(*zip(*points), marker='o', markersize=3, color=f'C{number}', label=name)
    axis.set_xticks(range(len(rows)), [row['shape'] for row in rows], rotation=90, fontsize=7)


def rounded(value: Any) -> Any:
    """The same with floats of five digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f'{value:.5g}') if isinstance(value, float) else value
