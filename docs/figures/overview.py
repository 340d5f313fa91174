# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Plots `overview.png`, the figure of the README: `python docs/figures/overview.py`.

Left and middle are a scheme with random positions and masks (area; red: negative).
The times on the right are those of `benchmarks/results/nvidia-h200-20261127-third-run.md`.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

BLUE, RED, GREY = '#2f6fb0', '#c8442f', '#b8b8b8'
SIDE = 7  # pixels of the maps in the scheme
# microseconds of 64x56x56x128, groups of 32 channels, offsets N(0, 0.5), float16
TIMES = {'forward': dict(released=216.5, mmdcnv4=82.5),
         'backward': dict(released=2436.7, mmdcnv4=306.6)}


def draw_map(axes, title, positions, masks):
    """The pixels of a map, and the samples of the one in the middle."""
    axes.set(xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5), xticks=[], yticks=[], aspect='equal')
    axes.hlines(np.arange(-0.5, SIDE), -0.5, SIDE - 0.5, color='#e2e2e2', linewidth=0.8)
    axes.vlines(np.arange(-0.5, SIDE), -0.5, SIDE - 0.5, color='#e2e2e2', linewidth=0.8)
    middle = (SIDE - 1) / 2
    axes.add_patch(Rectangle(
        (middle - 0.5, middle - 0.5), 1, 1, fill=False, edgecolor='black', linewidth=1.6))
    colours = [BLUE if mask > 0 else RED for mask in masks]
    axes.scatter(*positions.T, s=220 * np.abs(masks), c=colours, zorder=3, linewidths=0)
    axes.set_title(title, fontsize=10)


def main():
    """Writes the figure next to this file."""
    random = np.random.default_rng(12)
    rest = np.stack(np.meshgrid([2, 3, 4], [2, 3, 4]), -1).reshape(-1, 2).astype(float)
    figure = Figure(figsize=(10, 3.1), dpi=110, layout='constrained')
    fixed, learned, times = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    draw_map(fixed, '3x3 convolution: fixed positions,\nfixed weights', rest,
             np.full(9, 0.55))
    moved = rest + random.normal(0, 0.8, rest.shape)
    draw_map(learned, 'DCNv4: positions and masks\npredicted for every pixel',
             moved, np.where(np.arange(9) % 5 == 3, -1, 1) * random.uniform(0.2, 1.3, 9))
    for start, end in zip(rest, moved):
        learned.plot(*zip(start, end), color=GREY, linewidth=1, zorder=2)
    for place, peers in enumerate(TIMES.values()):
        for row, (name, colour) in enumerate((('released', GREY), ('mmdcnv4', BLUE))):
            height = 3 * place + row
            times.barh(height, peers[name], 0.85, color=colour)
            times.text(peers[name] + 30, height, f'{peers[name]} µs', va='center', fontsize=9)
    times.set_yticks([0, 1, 3, 4], [f'{direction}, {name}' for direction in TIMES
                                    for name in ('released', 'mmdcnv4')], fontsize=9)
    times.set(xticks=[], xlim=(0, 3000))
    times.invert_yaxis()
    times.spines[['top', 'right', 'bottom']].set_visible(False)
    times.set_title('Time on an NVIDIA H200\n64x56x56x128, float16, groups of 32', fontsize=10)
    figure.savefig(Path(__file__).with_name('overview.png'))


if __name__ == '__main__':
    main()
