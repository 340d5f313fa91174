# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a launch of a kernel executes: how often each part of it runs, and what that amounts to.

A kernel is instructions per part, which `dev/cuda/check_ptxas.py --write` counts in machine code
and writes to csrc/cuda/compiled.md; `read_compiled` reads them from there. How often the parts run
follows from the launch plan and, for those that only far taps need, from `FarRates`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

from far_taps import BLOCK, REACH, TAPS, WARP, FarRates
from window_groups import Group

COMPILED = Path(__file__).resolve().parents[1] / 'csrc' / 'cuda' / 'compiled.md'
BLOCK_PIXELS = BLOCK * BLOCK
WINDOW = (BLOCK + 2 * REACH)**2  # its cells
GATHERED_TAPS = 3  # under way at a time, kTogether of gather_unit
# Wavefronts of reading two chunks of the cells of a round, which lie among the others as samples
# happen to, by bytes of a number. Chunks of a cell are in one of eight orders, (x + 4y) % 8: the
# corners of a tap never meet, those of two taps do in three cases of four. In float32 words of the
# left corners of two taps are read, then of the right ones: they meet in one case of two.
PAIR_CONFLICTS = {2: 4 * 7 / 4, 4: 2 * 3 / 2}
# The same of cells side by side in the area of a warp, by lanes of a row and bytes of a number.
COPIED_CONFLICTS = {(2, 2): 4, (4, 2): 4, (8, 2): 4, (4, 4): 2 * 2, (8, 4): 2}
# One corner of 8 / team rows, each of which has its chunks in one of as many places, by team.
CELL_CONFLICTS = {2: 17 / 8, 4: 3 / 2, 8: 1}
COLUMNS = ['kernel', 'shape', 'dtype', 'arch', 'registers', 'instructions per part']


class Kernel(NamedTuple):
    """A row of the second table of compiled.md."""

    registers: int
    parts: dict[str, float]  # instructions per run of a part; of `warps`: per warp


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        direction: the kernel, 'forward', 'window_grad_value', …
        group: channels of a group.
        blocks, threads: of the grid, and of a block.
        rows: output pixels times groups.
        tile_h, tile_w: of kernels on tensor cores, else 0.
        owned: groups of 4x4 input pixels, of `window_grad_value`.
        rates: of far taps; None where there are no kernels on tensor cores.
    """

    direction: str
    group: Group
    blocks: int
    threads: int
    rows: int
    tile_h: int = 0
    tile_w: int = 0
    owned: int = 0
    rates: Optional[FarRates] = None

    @property
    def warps(self) -> int:
        """Of all blocks."""
        return self.blocks * self.threads // WARP

    @property
    def cells(self) -> int:
        """Pixels of a tile and of its halo."""
        return (self.tile_h + 2 * REACH) * (self.tile_w + 2 * REACH)

    @property
    def units(self) -> int:
        """Pairs of 4x4 pixels and group; a warp takes one at a time."""
        return self.blocks * self.tile_h * self.tile_w // BLOCK_PIXELS * self.group.of_slice // 2

    @property
    def stencils(self) -> int:
        """Turns of 32 pixels of tile and halo, of every group."""
        return self.blocks * self.group.of_slice * -(-self.cells // WARP)


def read_compiled(path: Path = COMPILED) -> dict[tuple[str, str, str, str], Kernel]:
    """(kernel, shape, dtype, architecture) -> kernel, from compiled.md."""
    lines = path.read_text().splitlines()
    head = '| ' + ' | '.join(COLUMNS) + ' |'
    if head not in lines:
        raise SystemExit(f'{path} has no table {head}: dev/cuda/check_ptxas.py --write makes it')
    kernels = {}
    for line in lines[lines.index(head) + 2:]:
        if not line.startswith('|'):
            break
        direction, shape, dtype, arch, registers, parts = (
            cell.strip() for cell in line.strip('|').split('|'))
        counts = (part.split() for part in parts.split(','))
        kernels[direction, shape, dtype, arch] = Kernel(
            int(registers), {name: float(count) for name, count in counts})
    return kernels


def executions(launch: Launch) -> dict[str, float]:
    """How often each part of a kernel runs in a launch; in machine_code.py they get their names."""
    runs: dict[str, float] = dict(warps=launch.warps)
    rates = launch.rates
    if rates is None:
        return runs
    lines = launch.blocks * (launch.tile_h + 2 * REACH)
    runs.update(lines=lines, copies=lines * ((launch.tile_w + 2 * REACH) // 4))
    if launch.direction == 'window_grad_value':
        runs.update(passes=launch.warps * launch.group.of_slice, stencils=launch.stencils,
                    prefetches=launch.stencils - launch.warps, blocks=launch.owned,
                    list_turns=rates.list_turns * launch.rows,
                    list_eights=rates.list_eights * launch.rows)
        return runs
    runs.update(units=launch.units)
    if launch.direction == 'window_grad_offset':
        runs.update(left_units=rates.left_units * launch.rows,
                    collects=rates.collects * launch.rows, takes=rates.takes * launch.rows)
        return runs
    gathered = rates.gathered * launch.rows
    passes = gathered * launch.group.team
    runs.update(products=launch.units - gathered, layered=rates.layered * launch.rows,
                layers=rates.layers * launch.rows, rounds=rates.rounds * launch.rows,
                retakes=(rates.layers - rates.layered) * launch.rows,
                copied_rounds=rates.copied_rounds * launch.rows, gathered=gathered,
                gather_passes=passes, gather_turns=passes * TAPS / GATHERED_TAPS,
                cell_taps=rates.cell_taps * launch.rows, pixel_taps=rates.pixel_taps * launch.rows)
    return runs


def instructions(kernel: Kernel, launch: Launch) -> float:
    """Warp instructions of a launch."""
    runs = executions(launch)
    unknown = kernel.parts.keys() - runs.keys()
    if unknown:
        raise ValueError(f'{launch.direction}: nothing says how often {sorted(unknown)} run')
    return sum(count * runs[part] for part, count in kernel.parts.items())


def shared_wavefronts(launch: Launch) -> float:
    """Wavefronts of shared memory of a launch of a kernel on tensor cores.

    From the layouts (dense_window.cuh, stencil_pitch): each access takes as many as it has lines of
    128 bytes, and more where far_taps counts conflicts. Numbers of offset_mask are as wide as those
    of value.
    """
    runs, rates, group = executions(launch), launch.rates, launch.group
    assert rates is not None
    corners = 4 * TAPS
    total = 4 * runs['copies']  # 32 lanes, 16 bytes each
    reads = 3 * TAPS if group.size == 4 else 16  # of a row's numbers, of 16 bits two at a time
    if launch.direction == 'window_grad_value':
        plane = 2 * REACH + 1
        # every eighth pixel's numbers begin in the same bank; weights are read and written
        per_stencil = 4 * group.number_copies(1) + 4 * reads + plane * plane
        per_stencil += 2 * corners * rates.stencil_conflicts
        # the lines of a window that no cell of a fragment's half reaches are left out
        return (total + per_stencil * launch.stencils
                + WINDOW * (3 / 8 + group.team / 8) * launch.owned)
    ways = 4 // group.of_unit  # pixels of a unit whose numbers begin in the same bank
    numbers = 4 * group.number_copies(group.of_unit) + ways * reads
    if launch.direction == 'window_grad_offset':
        # numbers, pixels; dots out, read; results put there, taken line by line
        lines = 16 if (group.of_unit, group.size) == (2, 2) else 32
        per_unit = numbers + WINDOW * group.team / 4
        per_unit += WINDOW + corners * rates.window_conflicts + ways * 3 * TAPS + lines
        return total + per_unit * launch.units + 4 * runs['takes']
    return (total + numbers * launch.units + products_wavefronts(launch)
            + gather_wavefronts(launch))


def products_wavefronts(launch: Launch) -> float:
    """Those of the forward kernel's units with a product, but for their numbers."""
    runs, rates, group = executions(launch), launch.rates, launch.group
    assert rates is not None
    # A cleared and read, pixels; results
    per_product = WINDOW * (2 + group.team / 4) + 2 * group.depth
    per_product += 2 * 4 * TAPS * rates.window_conflicts
    # corners of two taps at a time, where they lie among the cells or side by side; copies there
    from_cells = (runs['rounds'] - runs['copied_rounds']) * PAIR_CONFLICTS[group.size]
    copied = runs['copied_rounds'] * COPIED_CONFLICTS[group.team, group.size]
    put = runs['copied_rounds'] * group.round_rows * group.team / 8
    return (per_product * runs['products'] + (from_cells + copied) * group.team / 2
            + 4 * (put + rates.cell_copies * launch.rows))


def gather_wavefronts(launch: Launch) -> float:
    """Those of the forward kernel's units without a product, but for their numbers."""
    runs, team = executions(launch), launch.group.team
    written = TAPS * (4 + 2 + 1)  # weights, corners, step of 32 rows
    per_pass = TAPS * (2 + max(1, 4 // team))  # the same of 32 / team rows
    return (written * runs['gathered'] + per_pass * runs['gather_passes']
            + 4 * 4 * CELL_CONFLICTS[team] * runs['cell_taps'])
