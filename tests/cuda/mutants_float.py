# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in what the tensor-core kernels do in float32 alone, two numbers of TF32 for one, and in
what the type of value chooses; mutations.py tries them."""

from __future__ import annotations

from mutants_window import (
    DENSE,
    FAR,
    FOLDER,
    FORWARD,
    FRAGMENTS,
    LAUNCH,
    LISTED,
    OFFSET,
    SIMPLE,
    VALUE,
    F,
    G,
    W,
    fault,
)

from helpers.faults import Fault

GATHER, PLAN = FOLDER + 'unit_gather.cuh', 'csrc/window_plan.cpp'
F32, B32 = (f'{FOLDER}dcnv4_window_{name}_f32.cu' for name in ('forward', 'backward'))
PRODUCT, WIDE, LOOSE = (W + f'test_geometries[{name}-f32-3x3]'
                        for name in ('product-16', 'product-32', 'gather-16'))
BACK = G + 'test_geometries[16-f32]'
NEAR = G + 'test_nothing_left_over[f32]'
LISTED_TEST, FULL, LAUNCHES = (G + name for name in (
    'test_far_taps_are_listed[4.0-f32]', 'test_full_lists[f32-forward]',
    'test_several_launches[f32]'))
CLOSE, AWAY = (W + f'test_many_far_taps[lengths{number}-16-f32]' for number in range(2))
AWAY_WIDE = W + 'test_many_far_taps[lengths1-32-f32]'
TWO = W + 'test_two_units_of_a_warp[product-f32]'
NAN = W + 'test_pixels_that_are_not_finite[product-nan-3x3-f32]'
NAN_GRAD = G + 'test_numbers_that_are_nan[grad_output-f32]'
NO_ROOM, NO_ROOM_VALUE = (W + f'test_split_of_what_has_no_room[{where}]'
                          for where in ('mask', 'value'))
NO_ROOM_BACK = tuple(G + f'test_split_of_what_has_no_room[{where}]'
                     for where in ('value', 'grad_output', 'mask'))
CHOICE = W + 'test_not_made_for'

# what is left of a number without its low part
HIGH = '__uint_as_float(__float_as_uint({}) & 0xffffe000u)'
LOW_A = 'multiply_add_tf32_cut(to, low, high0, high1); // what is small first\n'
LOW_B = 'multiply_add_tf32_cut(to, high, b0 - high0, b1 - high1);\n'
TO_LOW = 'low[i] = __float_as_uint(number - __uint_as_float(high[i]));'


def without_low(name, file, start, number, end, unit, *tests):
    """`number`, between `start` and `end`, loses its low part."""
    return fault(name, file, start + number + end, start + HIGH.format(number) + end, unit, *tests)


SPLIT = [
    fault('the low part of A is dropped (forward)', FRAGMENTS, LOW_A, '', F32, PRODUCT),
    fault('the low part of A is dropped (backward)', FRAGMENTS, LOW_A, '', B32, NEAR),
    fault('the low part of B is dropped (forward)', FRAGMENTS, LOW_B, '', F32, PRODUCT),
    fault('the low part of B is dropped (backward)', FRAGMENTS, LOW_B, '', B32, NEAR),
    without_low('the low part of odd cells is dropped (forward)', FRAGMENTS,
                'eight[i / 2].put(2 + i % 2, ', 'read_shared<float>(from + kWeightBytes)', ');',
                F32, PRODUCT),
    without_low('the low part of far taps is dropped', FRAGMENTS,
                'eight[i / 2].put(2 * part + i % 2, ', '__uint_as_float(word)', ');', F32,
                PRODUCT, CLOSE),
    without_low('the low part of grad_output is dropped (grad_offset)', FRAGMENTS,
                'numbers.put(i, ', '__uint_as_float(from[i])', ');', B32, NEAR),
    without_low('the low part of value is dropped (grad_offset)', FRAGMENTS,
                'numbers.multiply(', '__uint_as_float(b0)', ', __uint_as_float(b1), to);', B32,
                NEAR),
    without_low('the low part of weights is dropped (grad_value)', VALUE,
                'fragment[i / 4].put(i % 4, ', 'weight', ');', B32, NEAR),
    without_low('the low part of grad_output is dropped (grad_value)', VALUE,
                'fragment[i].multiply(', '__uint_as_float(grads[2 * i])',
                ', __uint_as_float(grads[2 * i + 1]),', B32, NEAR),
    without_low('the low part of listed weights is dropped', LISTED, 'weights.put(2 * i + 1, ',
                'ListedTap::weight(x, y - 2.0f, mask)', ');', B32, LISTED_TEST),
    without_low('the low part of listed gradients is dropped', LISTED, 'weights.multiply(',
                'One::first(grads[0][j])', ', One::first(grads[1][j]), sum[j]);', B32,
                LISTED_TEST),
    fault('the high part of A counts twice', FRAGMENTS,
          'multiply_add_tf32_cut(to, low, high0, high1);',
          'multiply_add_tf32_cut(to, high, high0, high1);', F32, PRODUCT),
    fault('the product of the small ones in place of one', FRAGMENTS, LOW_B,
          LOW_B.replace('high, b0', 'low, b0'), F32, PRODUCT),
    fault('the second of B with the low part of the first', FRAGMENTS, LOW_B,
          LOW_B.replace('b1 - high1', 'b0 - high0'), F32, PRODUCT),
    fault('low parts are negative', FRAGMENTS, TO_LOW,
          'low[i] = __float_as_uint(__uint_as_float(high[i]) - number);', F32, PRODUCT),
    fault('the high part has a bit that TF32 has not', FRAGMENTS, 'kFirstBits = 0xffffe000u',
          'kFirstBits = 0xfffff000u', F32, PRODUCT),
    fault('the high part has a byte less', FRAGMENTS, 'kFirstBits = 0xffffe000u',
          'kFirstBits = 0xfff80000u', F32, PRODUCT),
    fault('half of the last bit is far too large', FRAGMENTS, 'kHalfOfLast = 0x1000u',
          'kHalfOfLast = 0x100000u', F32, PRODUCT),
    fault('A is cut and not rounded', FRAGMENTS, '(__float_as_uint(number) + kHalfOfLast)',
          '(__float_as_uint(number))', F32, PRODUCT, WIDE, TWO, CLOSE, NO_ROOM, equivalent=(
              'the low part has what is cut off; what is left out is twice as much, 2^-20')),
    fault('A is rounded up', FRAGMENTS, 'kHalfOfLast = 0x1000u', 'kHalfOfLast = 0x1fffu', F32,
          PRODUCT, WIDE, TWO, CLOSE, equivalent=(
              'the low part is what was too much; what is left out is twice as much, 2^-20')),
    fault('what is large first', FRAGMENTS,
          LOW_A + '      ' + LOW_B + '      multiply_add_tf32_cut(to, high, high0, high1);',
          '      multiply_add_tf32_cut(to, high, high0, high1);\n      ' + LOW_A + '      ' +
          LOW_B, F32, PRODUCT, WIDE, TWO, CLOSE, equivalent=(
              'the product of the cells before is as large: as much is cut off')),
    fault('NaN is finite in A (forward)', FRAGMENTS, TO_LOW, TO_LOW.replace(
        'number -', 'number != number ? 0.0f : number -'), F32, NO_ROOM),
    fault('NaN is finite in A (backward)', FRAGMENTS, TO_LOW, TO_LOW.replace(
        'number -', 'number != number ? 0.0f : number -'), B32, *NO_ROOM_BACK),
    fault('NaN is infinite in B', FRAGMENTS, LOW_B,
          LOW_B.replace('b0 - high0', 'b0 != b0 ? 0.0f : b0 - high0'), F32, NO_ROOM_VALUE, NAN,
          equivalent='sums that are infinite are gathered like those that are NaN'),
    fault('the largest numbers have no low part', FRAGMENTS, TO_LOW, TO_LOW.replace(
        'number -', 'high[i] << 1 == 0xff000000u ? 0.0f : number -'), F32, NO_ROOM, NAN,
        equivalent='sums that are infinite are gathered like those that are NaN'),
]

CELLS = [
    fault('the second line has the key of the first', FRAGMENTS,
          'Layout::chunk_at(x + 2 * t, y + line, a.cells_w, group * Layout::kTeam + g / 4)',
          'Layout::chunk_at(x + 2 * t, y, a.cells_w, group * Layout::kTeam + g / 4) + '
          'line * a.cells_w * kCellBytes', F32, PRODUCT),
    fault('both lines are the first', FRAGMENTS, 'chunk_at(x + 2 * t, y + line, a.cells_w',
          'chunk_at(x + 2 * t, y, a.cells_w', F32, PRODUCT),
    fault('cells of lanes are neighbours', FRAGMENTS, 'chunk_at(x + 2 * t, y + line, a.cells_w',
          'chunk_at(x + t, y + line, a.cells_w', F32, PRODUCT),
    fault('every channel is the first of four', FRAGMENTS, ' +\n                  g % 4 * '
          'uint32_t(sizeof(float));', ';', F32, PRODUCT),
    fault('both halves of a warp want one chunk', FRAGMENTS,
          'group * Layout::kTeam + g / 4) +\n', 'group * Layout::kTeam) +\n', F32, PRODUCT),
    fault('cells of the first group (float32)', FRAGMENTS,
          'group * Layout::kTeam + g / 4) +\n', 'g / 4) +\n', F32, PRODUCT),
    fault('chunks of the odd cell are not exchanged', FRAGMENTS,
          '((2 * load + i % 2) * kChunkBytes)', '((2 * load) * kChunkBytes)', F32, PRODUCT),
    fault('channels half way (float32)', FRAGMENTS, '((2 * load + i % 2) * kChunkBytes)',
          '((load + i % 2) * kChunkBytes)', F32, WIDE),
    fault('even and odd cells are exchanged', FRAGMENTS,
          'i % 2 * kCellBytes + step * step_bytes_', '(1 - i % 2) * kCellBytes + '
          'step * step_bytes_', F32, PRODUCT),
    fault('steps of one line', FRAGMENTS, 'i % 2 * kCellBytes + step * step_bytes_',
          'i % 2 * kCellBytes + step * step_bytes_ / 2', F32, PRODUCT),
    fault('the second eight are read first', FRAGMENTS, 'at_[i / 2] ^', 'at_[1 - i / 2] ^', F32,
          PRODUCT),
    fault('even and odd cells are exchanged (grad_value)', FRAGMENTS,
          'i % 2 * kCellBytes + step * step_bytes_', '(1 - i % 2) * kCellBytes + '
          'step * step_bytes_', B32, NEAR),
    fault('eight weights for the other eight cells', FRAGMENTS,
          'eight[i].multiply(__uint_as_float(pixels[2 * i])',
          'eight[1 - i].multiply(__uint_as_float(pixels[2 * i])', F32, PRODUCT),
    fault('one cell for two', FRAGMENTS,
          '__uint_as_float(pixels[2 * i + 1]), to[0]);', '__uint_as_float(pixels[2 * i]), to[0]);',
          F32, PRODUCT),
    fault('weights of the even cell for the odd', FRAGMENTS,
          'eight[i / 2].put(2 + i % 2, read_shared<float>(from + kWeightBytes));',
          'eight[i / 2].put(2 + i % 2, read_shared<float>(from));', F32, PRODUCT),
    fault('rows and cells of A are exchanged', FRAGMENTS,
          'eight[i / 2].put(i % 2, read_shared<float>(from));\n'
          '      eight[i / 2].put(2 + i % 2, read',
          'eight[i / 2].put(2 * (i % 2), read_shared<float>(from));\n'
          '      eight[i / 2].put(1 + 2 * (i % 2), read', F32, PRODUCT),
    fault('the second tile of channels is the first', FRAGMENTS,
          'multiply_add(to[tile], high, pixels[2 * tile], pixels[2 * tile + 1], T());',
          'multiply_add(to[tile], high, pixels[0], pixels[1], T());', F, SIMPLE),
    fault('sums of a load overlap', FORWARD, 'sum[m] + WeightFragment<T>::kTiles * load);',
          'sum[m] + load);', F, W + 'test_geometries[product-32-f16-3x3]'),
    fault('sums of a load lie apart', FORWARD, 'sum[m] + WeightFragment<T>::kTiles * load);',
          'sum[m] + 2 * load % (kDepth / 8));', F32, PRODUCT),
]

FAR_TAPS = [
    fault('far weights: rows and cells are exchanged', FRAGMENTS,
          'eight[i / 2].put(2 * part + i % 2,', 'eight[i / 2].put(part + 2 * (i % 2),', F32,
          PRODUCT),
    fault('far weights: the right corner weighs as the left', FRAGMENTS,
          'parts[1] = __float_as_uint(odd);', 'parts[1] = __float_as_uint(even);', F32, PRODUCT),
    fault('far corners are exchanged', FAR, 'cell = i / 2 * 8 + 2 * t + i % 2, row =',
          'cell = i / 2 * 8 + 2 * t + 1 - i % 2, row =', F32, CLOSE),
    fault('far corners of the other tap', FAR, '      return upper;\n',
          '      return cell / 4 % 2 != 0 ? rows[0] : rows[1];\n', F32, CLOSE),
    fault('far corners of the first tap', FAR, '      return upper;\n', '      return rows[0];\n',
          F32, CLOSE),
    fault('far corners of a lane that may have none (float32)', FAR,
          'row = row_of_cell(rows, cell);\n        const TapPlace from = '
          'place.of_lane(row < uint32_t(kWarp) ? row : rows[0]);',
          'row = row_of_cell(rows, cell);\n        const TapPlace from = place.of_lane(row);', F32,
          PRODUCT, CLOSE),
    fault('far cells: one chunk for both halves', FAR, '^ (g / 4 * kChunkBytes)', '', F32, CLOSE),
    fault('far copies: one chunk for both halves', FAR, ': chunk_at(cell, g / 4)) +',
          ': chunk_at(cell, 0)) +', F32, AWAY),
    fault('far channels: the first of four', FAR,
          ' +\n                g % 4 * uint32_t(sizeof(float));', ';', F32, CLOSE),
    fault('far channels: the first pair of chunks', FAR, 'base + (at[i] ^ chunk)', 'base + at[i]',
          F32, CLOSE),
    fault('far copies: none', FAR, 'for (int i = 0; i < kCopies; ++i) {',
          'for (int i = 0; i < kCopies / 2; ++i) {', F32, AWAY),
    fault('far copies: half of the chunks of wide groups', FAR,
          'for (int i = 0; i < kCopies; ++i) {', 'for (int i = 0; i < 1; ++i) {', F32, AWAY_WIDE),
    fault('far copies: chunks for four taps', FAR, 'kCopies = 4 * kRows * Layout::kTeam / kWarp;',
          'kCopies = Layout::kTeam / 2;', F32, AWAY, AWAY_WIDE),
    fault('far loads: half of the channels', FAR, 'load < kLoads; ++load',
          'load < kLoads / 2; ++load', F32, CLOSE),
    fault('far copies: channels by half numbers', FAR,
          'group * kDepth + chunk * kChunkNumbers<T>);', 'group * kDepth + chunk * 8);', F32, AWAY),
    fault('listed gradients of four further on', LISTED,
          'exists ? One::load(from + 8 * j) : typename One::Raw(0);',
          'exists ? One::load(from + 4 * j) : typename One::Raw(0);', B32, LISTED_TEST),
    fault('teams of the rest by half numbers', LAUNCH, 'p.group_channels / kChunkNumbers<T>));',
          'p.group_channels / 8));', B32, FULL),
    fault('second launch of float32: lists of the first image', LAUNCH,
          'lists.from(image), Divisor', 'lists, Divisor', B32, LAUNCHES),
]

REST = [
    fault('slices of 64 channels in float32', PLAN, 'kWindowSliceBytes / request.element_bytes;',
          '64;', PLAN, PRODUCT),
    fault('64 channels in float32', PLAN, '(depth == 64 && !is_float)', 'depth == 64', PLAN,
          CHOICE),
    fault('float64 on tensor cores', PLAN, 'request.element_bytes <= 4 &&',
          'request.element_bytes <= 8 &&', PLAN, CHOICE),
    fault('groups of a slice by half numbers', DENSE, 'kCellBytes / (kDepth * sizeof(T));',
          'kCellBytes / (kDepth * 2);', F32, PRODUCT),
    fault('copied channels by half numbers', DENSE,
          'tile.first_group * kDepth + chunk * kChunkNumbers<T>;',
          'tile.first_group * kDepth + chunk * 8;', F32, PRODUCT),
    fault('half of the channels are finished', FORWARD, 'i < int(kChunkNumbers<T>); i += 4) {',
          'i < 4; i += 4) {', F, SIMPLE),
    fault('columns by half numbers', FORWARD,
          'const uint32_t column = lane % Layout::kTeam * kChunkNumbers<T>;',
          'const uint32_t column = lane % Layout::kTeam * 8 % kDepth;', F32, PRODUCT),
    fault('one of four numbers may be NaN', FORWARD, '(n[2] + n[3])) <= FLT_MAX;',
          'n[2]) <= FLT_MAX;', F32, NAN),
    fault('another of four numbers may be NaN', FORWARD, 'fabsf((n[0] + n[1]) + (n[2]',
          'fabsf(n[1] + (n[2]', F32, NAN),
    fault('gathered columns by half numbers', GATHER,
          'const uint32_t column = lane % kTeam * kChunkNumbers<T>;',
          'const uint32_t column = lane % kTeam * 8 % kDepth;', F32, LOOSE),
    fault('Y begins at pairs', OFFSET, '+ kInWord * t;', '+ 2 * t;', B32, NEAR),
    fault('Y in steps of half numbers', OFFSET,
          'VectorIo<T, kInWord>::load(from + kChunkNumbers<T> * i) : 0;',
          'VectorIo<T, kInWord>::load(from + 8 * i % kDepth) : 0;', B32, NEAR),
    fault('gradients are written in pairs', OFFSET, 'int32_t(lane) * kTogether + j;',
          'int32_t(lane) * 2 + j;', B32, BACK),
    fault('sums of a load: the first (grad_value)', VALUE, '                               '
          'sum[load]);', '                               sum[0]);', B32, NEAR),
    fault('eight weights for the other eight pixels', VALUE,
          'fragment[i].multiply(__uint_as_float(grads[2 * i])',
          'fragment[1 - i].multiply(__uint_as_float(grads[2 * i])', B32, NEAR),
    fault('rows of A^T are exchanged', VALUE, 'fragment[i / 4].put(i % 4, weight);',
          'fragment[i / 4].put(i % 4 ^ 1, weight);', B32, NEAR),
    fault('exact sums: the wrong chunk', VALUE, 'channel / kChunkNumbers<T>)', 'channel / 8)', B32,
          NAN_GRAD),
    fault('exact sums: the first pair of a chunk', VALUE,
          'channel % kChunkNumbers<T> * sizeof(T)),', 'channel % 2 * sizeof(T)),', B32, NAN_GRAD),
]

FAULTS: list[Fault] = [*SPLIT, *CELLS, *FAR_TAPS, *REST]
