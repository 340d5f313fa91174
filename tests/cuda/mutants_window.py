# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in the tensor-core kernels; mutations.py tries them."""

from __future__ import annotations

from helpers.faults import Fault

W, G = 'tests/cuda/test_window_kernel.py::', 'tests/cuda/test_window_backward.py::'
FOLDER = 'csrc/cuda/window/'
FORWARD, OFFSET, VALUE = (f'{FOLDER}dcnv4_window_{name}.cuh'
                          for name in ('forward', 'grad_offset', 'grad_value'))
DENSE, FRAGMENTS, NUMBERS, TAPS, FAR, LISTS, LISTED, REST, LAUNCH = (
    FOLDER + name for name in (
        'dense_window.cuh', 'fragments.cuh', 'window_numbers.cuh', 'window_taps.cuh',
        'far_taps.cuh', 'far_lists.cuh', 'listed_taps.cuh', 'dcnv4_window_grad_rest.cuh',
        'dcnv4_window_backward.cuh'))
F, F_BF16, B, B_BF16 = (f'{FOLDER}dcnv4_window_{name}.cu' for name in (
    'forward_f16', 'forward_bf16', 'backward_f16', 'backward_bf16'))
SIMPLE, RING = (W + f'test_geometries[product-16-f16-{name}]' for name in ('3x3', '3x3-ring'))
TWO, TWO_SPLIT = (W + f'test_two_units_of_a_warp[product-{name}]' for name in ('f16', 'bf16-f32'))
BACK_TWO = G + 'test_two_units_of_a_warp[f16]'
BANKS = W + 'test_bank_conflicts[f16]'
NOT_FINITE = W + 'test_pixels_that_are_not_finite[product-nan-3x3-f16]'
MASKS = W + 'test_masks_of_every_size[product-f16]'
BACK, BACK_32 = (G + f'test_geometries[{name}]' for name in ('16-f16', '32-f16'))
SMALL_TILE = G + 'test_little_shared_memory[f16-40]'
FULL = G + 'test_full_lists[f16-forward]'
NAN_GRAD = G + 'test_numbers_that_are_nan[grad_output-f16]'
HOSTILE = G + 'test_hostile_offsets[3x3-f16]'
LISTED_TEST = G + 'test_far_taps_are_listed[1.0-f16-f32]'


def fault(name, file, right, wrong, unit, *tests, equivalent=''):
    return Fault(name, file, right, wrong, tests, (unit,), equivalent)


def barrier(name, file, right, unit, *tests):
    """Without the barrier, or the wait, that `right` ends with."""
    lines = right.splitlines(keepends=True)
    kept = lines[-1].replace('__syncthreads();', ';') if 'if (unit' in lines[-1] else ''
    return Fault(f'no barrier: {name}', file, right, ''.join(lines[:-1]) + kept, tests, (unit,))


BARRIERS = [
    barrier('numbers are copied, then read (forward)', FORWARD,
            '    wait_copies<1>(); // the cells may take until A is there\n    __syncwarp();\n',
            F, SIMPLE),
    barrier('numbers are waited for (forward)', FORWARD,
            '    wait_copies<1>(); // the cells may take until A is there\n', F, SIMPLE),
    barrier('numbers are read, then cleared (forward)', FORWARD,
            'numbers = Numbers::load(a, lane, first_group, image.packed, area);\n'
            '    __syncwarp();\n', F, SIMPLE),
    barrier('cleared, then scattered (forward)', FORWARD,
            '      scale = scale_of_row<T>(numbers, points);\n      __syncwarp();\n',
            F, SIMPLE),
    barrier('__syncthreads after the cells (forward)', FORWARD,
            '      wait_copies<0>();\n      __syncthreads();\n', F, SIMPLE),
    fault('cells are waited for (forward)', FORWARD,
          '      wait_copies<0>();\n      __syncthreads();\n', '      __syncthreads();\n',
          F, SIMPLE),
    barrier('__syncwarp between scatter and product (forward)', FORWARD,
            '      __syncthreads();\n    }\n    __syncwarp();\n', F, TWO),
    barrier('__syncthreads after the cells (grad_offset)', OFFSET,
            '    wait_copies<0>();\n    if (unit == warp) __syncthreads();\n', B, BACK),
    barrier('numbers are copied, then read (grad_offset)', OFFSET,
            '    if (unit == warp) __syncthreads();\n    __syncwarp();\n', B, BACK_TWO),
    barrier('numbers are read, then overwritten (grad_offset)', OFFSET,
            'numbers = Numbers::load(a, lane, first_group, packed, area);\n    __syncwarp();\n',
            B, BACK),
    barrier('dot products are written, then read', OFFSET,
            '    dot_cells<T, kDepth>(a, unit, lane, grads, cells, area);\n'
            '    __syncwarp();\n', B, BACK),
    barrier('dot products are read, then overwritten', OFFSET,
            'grad = read_taps<Layout>(a, lane, row, numbers, area);\n    __syncwarp();\n',
            B, BACK),
    barrier('left-over taps are collected, then taken', OFFSET,
            'count = gradients.collect(lane, left_over);\n      __syncwarp();\n', B, BACK),
    barrier('gradients are put, then written out', OFFSET,
            '                                        lists, gradients);\n    }\n'
            '    __syncwarp();\n', B, BACK),
    barrier('gradients are written out, then overwritten', OFFSET,
            '    gradients.write(tile, unit, lane, grad_packed.data);\n    __syncwarp();\n',
            B, BACK_TWO),
    barrier('numbers are copied, then read (grad_value)', VALUE,
            'if (index != threadIdx.x || pass != 0) wait_copies<0>();\n      __syncwarp();\n',
            B, BACK),
    fault('numbers of the next pixels are waited for', VALUE,
          '      if (index != threadIdx.x || pass != 0) wait_copies<0>();\n', '', B, SMALL_TILE),
    barrier('numbers are read, then copied over', VALUE,
            'numbers = Numbers::load(a, lane, group, packed, staged);\n      __syncwarp();\n',
            B, BACK),
    barrier('__syncthreads between scatter and product (grad_value)', VALUE,
            '    wait_copies<0>();\n    __syncthreads();\n', B, BACK),
    fault('pixels are waited for', VALUE, '    wait_copies<0>();\n    __syncthreads();\n',
          '    __syncthreads();\n', B, BACK),
    barrier('__syncthreads between groups (grad_value)', VALUE,
            '    if (is_last) break;\n    __syncthreads();\n', B, BACK),
]

PRODUCTS = [
    fault('half of the weights is not cleared', FORWARD, 'i < Layout::kAreaBytes; i += kWarp * 16',
          'i < Layout::kAreaBytes / 2; i += kWarp * 16', F, BANKS),
    fault('weights replace each other', FORWARD, 'read_shared<float>(area + at[c]) + weight[c]',
          'weight[c]', F, SIMPLE),
    fault('rows of A are exchanged', FORWARD, 'm * kMatrixRows + half * 8 + g);',
          'm * kMatrixRows + half * 8 + (g ^ 1));', F, SIMPLE),
    fault('the last column of a window counts as near', FORWARD,
          'constexpr uint32_t kLast = kWindowSide - 1;', 'constexpr uint32_t kLast = kWindowSide;',
          F, SIMPLE),
    fault('results at half the distance', FORWARD,
          '(m * kMatrixRows + half * 8) * Layout::kResultBytes',
          '(m * kMatrixRows + half * 4) * Layout::kResultBytes', F, SIMPLE),
    fault('the scale of a row is not undone', FORWARD, 'number[i] * factor;', 'number[i];',
          F, SIMPLE),
    fault('the scale of another row is undone', FORWARD,
          '__shfl_sync(kAllLanes, inverse, int(index))', 'inverse', F,
          MASKS),
    fault('low halves of the split are dropped', FRAGMENTS,
          '      if constexpr (kParts == 2)\n        multiply_add(to[tile], low, pixels[2 * tile], '
          'pixels[2 * tile + 1], T());\n', '', F_BF16, TWO_SPLIT),
    fault('the split keeps one of two numbers', FRAGMENTS,
          'parts[1] = narrow_pair(even - rounded.x, odd - rounded.y, T());',
          'parts[1] = narrow_pair(even - rounded.x, 0.0f, T());', F_BF16, TWO_SPLIT),
    fault('low halves of far taps are dropped', FAR,
          '    Fragment::pack(weight.z, weight.w, weights[1]);\n',
          '    Fragment::pack(weight.z, weight.w, weights[1]);\n'
          '    weights[1][kParts - 1] = 0;\n', F_BF16, W + 'test_geometries[product-16-bf16-3x3]'),
    fault('no limit of the scale', NUMBERS, 'wanted < 253 ? wanted : 253', 'wanted', F,
          MASKS, equivalent=(
              'such rows have masks below 2^-115, so that their outputs are zero in float16; where '
              'the scale is infinite the row is gathered')),
    fault('halves of a row of Y are exchanged', OFFSET, 'grads[m][i / 2][half + i % 2 * 2]',
          'grads[m][i / 2][half * 2 + i % 2]', B, BACK),
    fault('cells and chunks of a fragment are exchanged', OFFSET,
          'const uint32_t cell = of / kTeam * 8 + lane % 8;',
          'const uint32_t cell = of % 2 * 8 + lane % 8;', B, BACK),
    fault('weights in the wrong lines', VALUE, '            half * 2 * a.stencil.line);',
          '            half * a.stencil.line);', B, BACK),
    fault('outermost weights are left out', VALUE, 'return pixel - cell <= 2 * kReach; // wraps',
          'return pixel - cell < 2 * kReach;', B, BACK),
    fault('sums of both halves in one line', VALUE,
          'y = tile.y + block.y + block.cy + 2 * half;', 'y = tile.y + block.y + block.cy + half;',
          B, BACK),
    fault('weights replace each other (grad_value)', VALUE,
          'read_shared<float>(corner[c]) + weight[c]', 'weight[c]', B, BACK),
    fault('lines that no row reaches are tested', VALUE, 'if (line >= 2 * half &&',
          'if (line + 1 >= 2 * half &&', B, BACK,
          equivalent='the condition only saves tests: has_weight() decides'),
]

BORDERS = [
    fault('a column after the last', DENSE, '(in_x + x < uint32_t(a.map_w));',
          '(in_x + x <= uint32_t(a.map_w));', F, SIMPLE),
    fault('a line after the last', DENSE, '(in_y + y < uint32_t(a.map_h));',
          '(in_y + y <= uint32_t(a.map_h));', F, SIMPLE),
    fault('channels after the last', DENSE, 'has_channel = channel < a.call.channels;',
          'has_channel = channel <= a.call.channels;', F, SIMPLE),
    fault('chunks meet in the banks', DENSE, '(chunk ^ ((x + 4 * y) & 7))', '(chunk ^ (x & 7))',
          F, W + 'test_no_conflicts_but_in_the_scatter[16-f16]'),
    fault('weights meet in the banks', DENSE, '((row * kRowBytes) ^ ((cell & 6) << 4));',
          '(row * kRowBytes);', F, BANKS),
    fault('results meet in the banks', DENSE, '^ (key * kChunkBytes);', '^ (key * 0);',
          F, BANKS),
    fault('pitch of the other map', DENSE, 'uint32_t(row.y) * uint32_t(a.rows_w)',
          'uint32_t(row.y) * uint32_t(a.map_w)', F, RING),
    fault('a row after the last is valid', DENSE, 'row.x < a.rows_w && row.y < a.rows_h;',
          'row.x <= a.rows_w && row.y < a.rows_h;', F, SIMPLE),
    fault('padding of the other axis', DENSE, 'sign * int32_t(p.center_w() - p.pad_w);',
          'sign * int32_t(p.center_w() - p.pad_h);', F, RING),
    fault('the map of cells is always the input', DENSE,
          'int32_t(plan.is_mirrored ? p.out_width : p.width);', 'int32_t(p.width);',
          B, BACK_32),
    fault('shift not mirrored', DENSE, 'plan.is_mirrored ? -1 : 1', '1', B, BACK_32),
    fault('groups begin at a chunk', NUMBERS,
          'lane % kPixels * kPitch + lead(a, first_group) + lane',
          'lane % kPixels * kPitch + lane', F, SIMPLE),
    fault('numbers after the last group', NUMBERS, 'first_group + 1 < uint32_t(a.call.groups)',
          'first_group + 1 <= uint32_t(a.call.groups)', F, SIMPLE),
    fault('numbers within a word', NUMBERS, '(from)) % 4 * 8;', '(from)) % 4 * 0;', F, SIMPLE),
    fault('the ring begins later', TAPS, 'const int next = k < 4 ? k : k + 1;',
          'const int next = k < 5 ? k : k + 1;', F, RING),
    fault('the ring has nine taps', FORWARD, 'if (k == kTaps - 1 && is_ring) continue;\n', '\n',
          F, RING),
    fault('samples on column -1 count', TAPS,
          'bool is_on_edge(const Place& move, const Place& edge) {\n',
          'bool is_on_edge(const Place& move, const Place& edge) {\n  return false;\n',
          B, HOSTILE),
    fault('floor towards zero', TAPS, 'column = floorf(move.x)', 'column = truncf(move.x)',
          B, BACK),
    fault('the far edge of the reach is near', TAPS, '(move.x < far)', '(move.x <= far)',
          B, HOSTILE),
    fault('output pixels after the last', VALUE, 'x < uint32_t(a.map_w) &&',
          'x <= uint32_t(a.map_w) &&', B, BACK),
    fault('offset_scale is left out', OFFSET, 'scale = a.call.scale * numbers.mask[k];',
          'scale = numbers.mask[k];', B, BACK_32),
    fault('padding is what was in memory', OFFSET, '      if (number < used)\n', '', B,
          G + 'test_maps_of_two_sizes[0]'),
    fault('half of a word is padding', OFFSET,
          'if (kTogether == 2 && number + 1 == used) word &= Word(0xffff);\n', '\n', B, BACK,
          G + 'test_padding_of_any_content', equivalent=(
              'there lies the gradient of a group that does not exist; it is zero, as all of its '
              'dot products and masks are')),
    fault('second launch: pixels of the first image', FORWARD,
          '             value + image * p.height * p.width * p.channels(),\n',
          '             value,\n', F_BF16, W + 'test_several_launches'),
    fault('second launch: lists of the first image', LAUNCH,
          'lists.from(image), Divisor', 'lists, Divisor', B_BF16,
          G + 'test_several_launches'),
]

FAR_TAPS = [
    fault('gradients that are not finite are done', OFFSET, '+ of.mask) <= FLT_MAX;',
          '+ of.mask) <= FLT_MAX || true;', B, NAN_GRAD),
    fault('the first left-over tap twice', OFFSET, 'end += lane >= step ? before : 0;',
          'end += lane > step ? before : 0;', B, BACK),
    fault('a left-over tap after the last', OFFSET, 'const bool has_tap = index < count;',
          'const bool has_tap = index <= count;', B, LISTED_TEST),
    fault('the ring leaves over nine taps', OFFSET,
          '  grad.rest &= (1u << a.call.points) - 1u;\n', '', B, BACK_32),
    fault('a block is listed twice', LISTS, ' || (corner / 2 != 0 && top == bottom))', ')',
          B, LISTED_TEST),
    fault('lists of non-square maps overlap', LISTS, '* blocks_w + block_x)',
          '* blocks_h + block_x)', B, FULL),
    fault('a list runs over', LISTS, 'if (at < room) {', 'if (at <= room) {', B, FULL),
    fault('no list is full', LISTS, '      *has_full = 1;\n', '', B, FULL),
    fault('far weights do not end', LISTED,
          'return is_sampled ? mask * ((1.0f - fabsf(y)) * (1.0f - fabsf(x))) : 0.0f;',
          'return is_sampled || mask == mask ? mask * ((1.0f - fabsf(y)) * (1.0f - fabsf(x))) '
          ': 0.0f;', B, BACK),
    fault('far weights of the wrong lines', LISTED, 'ListedTap::weight(x, y - 2.0f, mask));',
          'ListedTap::weight(x, y + 2.0f, mask));', B, BACK),
    fault('pixels of lanes without a tap', LISTED, 'const bool exists = tap < int(here);',
          'const bool exists = tap >= 0;', B, NAN_GRAD, equivalent=(
              'such lanes have weight zero; a NaN there makes the sums be taken again, exactly')),
    fault('far taps spread NaN', LISTED,
          'if (!((x >= -1.0f) & (x < 1.0f) & (down >= -1.0f) & (down < 1.0f))) continue;\n', '\n',
          B, FULL, NAN_GRAD),
    fault('lists are read in whole warps', LISTED,
          'count - first < uint32_t(kWarp) ? count - first : kWarp;', 'kWarp;', B, BACK),
    fault('sums of full lists are left out', VALUE, 'is_full ? lists.sums(list) : nullptr',
          'nullptr', B, FULL),
    fault('untouched places hold zero', VALUE, 'kUntouched = 0x80000000u;', 'kUntouched = 0u;', B,
          NAN_GRAD),
    fault('a weight of -0.0 is untouched', VALUE, '{w.w00 + 0.0f, w.w01 + 0.0f,',
          '{w.w00, w.w01,', B, NAN_GRAD),
    fault('exact sums are added to the others', VALUE, 'sum[i / 4][i % 4] = 0;', '', B, NAN_GRAD),
    fault('exact sums without far taps', VALUE, '        add_list(std::true_type());\n', '', B,
          NAN_GRAD),
    fault('memory of full lists is not cleared', REST, '      numbers[i] = T{};\n', '      ;\n',
          B, FULL, equivalent=(
              'numbers of taps lie there; as float32 they are below 1e-19 in images of up to 59 '
              'million pixels')),
    fault('near taps are added again', REST,
          'if (is_near(move_of_tap(a, k, tap.dx, tap.dy), edge, reach)) continue;', '', B,
          FULL),
    fault('cells of a full list transposed', REST,
          'y % kBlockSide * kBlockSide + x % kBlockSide', 'x % kBlockSide * kBlockSide + '
          'y % kBlockSide', B, FULL),
    fault('full lists are not filled', LAUNCH,
          '    launch_window_grad_rest(p, plan, stream, grad_output, offset_mask, lists);\n', '',
          B, FULL),
]

FAULTS = [*BARRIERS, *PRODUCTS, *BORDERS, *FAR_TAPS]
