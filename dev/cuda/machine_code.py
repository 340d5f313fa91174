# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a warp executes of a kernel, counted in disassembled machine code.

A loop, or a stretch of code that a branch may skip, is a *span*, and so is what runs instead of
such a stretch. Some spans are parts of their own (`rounds`, `takes`, …): how often they run depends
on the call, and is what `executions` in benchmarks/executions.py says. The code around them belongs
to the part that encloses it, times the turns of the loops in between. So a kernel is a few numbers,
instructions per run of each part.

The compiler moves code about; spans are told by the instructions that occur in them. Both sides of
branches count where neither is a part, which is a few per cent more than what is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple, Optional

from window_groups import CHUNK_BYTES, Group

Code = list[tuple[int, str]]  # address, instruction


class Span(NamedTuple):
    """First and last instruction, whether it is a loop or is skipped, and what is in it."""

    begin: int
    end: int
    is_loop: bool
    has_loop: bool
    body: str

    def has(self, *words: str) -> bool:
        """Whether all of these instructions occur."""
        return all(re.search(rf'\b{word}\b', self.body) for word in words)

    def count(self, word: str) -> int:
        """How often an instruction occurs."""
        return len(re.findall(rf'\b{word}\b', self.body))


class Role(NamedTuple):
    """A part of its own, with the share of a run that the code is; or turns within another part."""

    turns: float
    part: Optional[str] = None


SAME = Role(1)
NEVER = Role(0)


def functions(sass: str) -> Iterator[tuple[str, Code]]:
    """Names of the kernels in disassembled code, with addresses and instructions."""
    for piece in sass.split('Function : ')[1:]:
        name, _, code = piece.partition('\n')
        found = re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);', code, re.MULTILINE)
        yield name.strip(), [(int(at, 16), line) for at, line in found if 'NOP' not in line]


def spans_of(code: Code) -> list[Span]:
    """Loops, skipped stretches and those taken instead, outer ones first."""
    places = {address: i for i, (address, _) in enumerate(code)}

    def target(i: int, pattern: str = r'.*\bBRA\b.*?\b0x([0-9a-f]+)') -> Optional[int]:
        found = re.match(pattern, code[i][1])
        return places.get(int(found[1], 16)) if found else None

    found, ends = [], {}
    for i, (_, line) in enumerate(code):
        to = target(i)
        if to is None or 'BRA.DIV' in line:  # a detour
            continue
        if to < i or to > i + 1 and re.search(r'\bU?P\d', line):  # back, or on a condition
            found.append((min(to, i + 1), max(to - 1, i), to < i))
        past = target(to - 1, r'BRA 0x([0-9a-f]+)') if to > i + 1 else None
        if past is not None and past > to:  # the stretch ends by jumping over another one
            ends[i + 1, to - 1] = past - 1
            found.append((to, past - 1, False))
    # jumps from a stretch past the other one skip what is left of the first
    found = [(begin, min([end, *(last for (first, last), other in ends.items()
                                 if first <= begin <= last and end == other)]), is_loop)
             for begin, end, is_loop in found]
    loops = [(begin, end) for begin, end, is_loop in found if is_loop]
    result = [Span(begin, end, is_loop,
                   any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops),
                   ' '.join(text for _, text in code[begin:end + 1]))
              for begin, end, is_loop in found]
    return sorted(result, key=lambda span: (span.begin - span.end, not span.is_loop))


def direct_role(span: Span, direction: str, group: Group) -> Role:
    """Direct kernels: 9 taps; a team of threads has a row."""
    if not span.is_loop:
        # numbers of grad_output that a row adds are loaded once, with its first corner
        is_loading = direction == 'backward' and span.has('LDG') and 'RED' not in span.body
        return NEVER if is_loading and not span.has('F2I') else SAME
    if direction == 'backward' and 'RED' in span.body:
        # taps; around them taps by nines, within them channels, and before sm_90 rows, where
        # several add together
        if span.has('SHFL'):
            return Role(1 if span.has('STG') else 9)
        return SAME if 'LDG' in span.body else Role(max(1, 8 // group.team))
    if span.has('SHFL'):
        return Role(math.log2(group.team))
    if 'LDG.E.128' in span.body:  # forward, channels
        return SAME
    if span.has('F2I'):  # coefficients
        return Role(-(-9 // group.team))
    if span.has('STG', 'LDS'):  # results
        return Role(-(-27 // group.team))
    return NEVER  # borders, padding


def attention_role(span: Span, direction: str, group: Group) -> Role:
    """Kernels of attention: 4 levels, 4 points."""
    team, count = group.team, {'attention_forward': 16}.get(direction, 32)
    if not span.is_loop:
        return SAME
    if direction == 'attention_forward':
        if 'LDG.E.128' in span.body:  # two samples a turn; the loops around it once
            return SAME if re.search('F2I|STG|SHFL', span.body) else Role(count / 2)
        return Role(-(-count // team) if span.has('F2I') else
                    math.log2(team) if span.has('SHFL') else 0)
    reductions = span.body.count('RED')
    if reductions:  # samples; around them once, with the last additions
        vec = CHUNK_BYTES // group.size
        return Role(count if reductions <= (vec if 'F32x4' in span.body else 4 * vec) else 1)
    return Role(math.log2(team) if span.has('SHFL') else -(-count // team))


def copying_role(span: Span, number_copies: int) -> Optional[Role]:
    """Loops that copy to shared memory in the background, as all kernels on tensor cores have."""
    if not span.is_loop or not span.has('LDGSTS') or span.has('HMMA') or span.has('FRND'):
        return None
    if span.has('SHFL'):  # numbers of 32 rows
        return Role(number_copies / span.count('LDGSTS'))
    return Role(1, 'lines') if span.has_loop else Role(1 / span.count('LDGSTS'), 'copies')


def forward_role(span: Span, inside: str, group: Group) -> Role:
    """The forward kernel on tensor cores."""
    if span.has('HMMA'):
        if span.has('STG'):
            return Role(1, 'units' if span.is_loop else 'products')
        if not span.is_loop:
            return Role(1, 'layered') if inside == 'products' else SAME
        return Role(1, 'layers' if span.has('F2I') else 'rounds')
    if inside == 'products' and span.has('STG', 'F2I'):
        return NEVER  # sums that are not finite are gathered
    if span.is_loop:
        return Role(1, 'gather_passes' if span.has('STG') else 'gather_turns') \
            if span.has('LDG', 'FFMA') else SAME
    if span.has('F2I'):
        if span.has('STS'):  # weights of a product, or taps to be gathered
            return Role(1, 'products' if span.has('LDG') else 'gathered')
        part = {'products': 'layered', 'layers': 'retakes'}.get(inside)
        return Role(1, part) if part and span.has('LDG') else SAME
    if span.has('STG', 'FFMA'):
        return Role(1, 'gathered')
    if inside == 'gather_turns' and span.has('LDG') != span.has('LDS'):  # of one of three taps
        return Role(1 / 3, 'cell_taps' if span.has('LDS') else 'pixel_taps')
    return Role(1, 'copied_rounds') if inside == 'rounds' and span.has('STS') else SAME


def grad_offset_role(span: Span, inside: str, group: Group) -> Role:
    """The gradient of offsets and masks on tensor cores."""
    if span.has('HMMA'):
        return Role(1, 'units') if span.is_loop else SAME
    if inside != 'warps' and not span.is_loop and span.has_loop and span.has('SHFL', 'F2I'):
        return Role(1, 'left_units')
    if span.is_loop and span.has('LDG', 'F2I'):
        return Role(1, 'takes')
    if span.is_loop and span.has('SHFL'):  # sums over a team
        return Role(math.log2(group.team))
    if span.is_loop and span.has('STG', 'LDS'):  # gradients of a pixel's rows, four at a time
        return Role(8 / group.of_unit)
    return Role(1, 'collects') if span.is_loop and span.has('STS') else SAME


def grad_value_role(span: Span, inside: str, group: Group) -> Role:
    """The gradient of value on tensor cores; a slice of one group needs no loop over groups."""
    is_outside = inside == ('warps' if group.of_slice == 1 else 'passes')
    if span.has('HMMA'):
        if span.has('STG'):
            if is_outside:
                return SAME if span.is_loop else Role(1, 'blocks')
            return Role(1, 'passes') if span.is_loop and inside == 'warps' else SAME
        return Role(1, 'list_turns' if span.has_loop else 'list_eights') if span.is_loop else SAME
    if is_outside and span.is_loop and span.has('F2I'):
        return Role(1, 'stencils')
    if inside == 'stencils' and not span.is_loop and span.has('LDGSTS'):
        return Role(1, 'prefetches')
    is_again = inside in ('blocks', 'warps') and span.has_loop and not span.is_loop and \
        not re.search('STG|F2I|LDGSTS', span.body)
    return NEVER if is_again else SAME  # sums that are not finite are taken again


WINDOW_ROLES = {'window_forward': forward_role, 'window_grad_offset': grad_offset_role,
                'window_grad_value': grad_value_role}


def parts_of(code: Code, direction: str, group: Group) -> dict[str, float]:
    """Instructions per run of each part; of `warps`, per warp.

    Args:
        code: of a kernel.
        direction: 'forward', 'window_grad_value', …
        group: channels of a group; a thread holds 16 bytes of them.
    """
    last = max(i for i, (_, line) in enumerate(code) if 'EXIT' in line)  # then: detours
    if direction in ('window_grad_rest', 'window_clear'):  # leave at the second EXIT, as a rule
        return {'warps': float([i for i, (_, line) in enumerate(code) if 'EXIT' in line][1] + 1)}
    code = code[:last]
    owners, weights = ['warps'] * last, [1.0] * last
    for span in spans_of(code):
        inside = owners[span.begin]
        if direction in WINDOW_ROLES:
            beside = 1 if direction == 'window_grad_value' else group.of_unit
            role = (copying_role(span, group.number_copies(beside))
                    or WINDOW_ROLES[direction](span, inside, group))
        else:
            find = attention_role if direction.startswith('attention') else direct_role
            role = find(span, direction, group)
        for i in range(span.begin, span.end + 1):
            if role.part is None:
                weights[i] *= role.turns
            elif weights[i] > 0:
                owners[i], weights[i] = role.part, role.turns
    parts: dict[str, float] = {}
    for owner, weight in zip(owners, weights):
        parts[owner] = parts.get(owner, 0) + weight
    return parts
