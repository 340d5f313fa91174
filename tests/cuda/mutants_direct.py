# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in the direct kernels, the plans and the kernels of multi-scale attention; mutations.py
tries them."""

from __future__ import annotations

from helpers.faults import Fault

K, A = 'tests/cuda/test_emulated_kernels.py::', 'tests/cuda/test_emulated_attention.py::'
FOLDER, ATTENTION = 'csrc/cuda/', 'csrc/cuda/attention/attention_'
FORWARD, BACKWARD, GATHER, SAMPLING, ARGUMENTS, OFFSETS, VECTORS = (FOLDER + name for name in (
    'dcnv4_forward.cuh', 'dcnv4_backward.cuh', 'gather_tap.cuh', 'sampling.cuh', 'arguments.h',
    'offset_numbers.cuh', 'vector_io.cuh'))
PLAN, WINDOW_PLAN, LIMITS, BILINEAR = (f'csrc/{name}' for name in (
    'launch_plan.cpp', 'window_plan.cpp', 'launch_plan.h', 'bilinear.h'))
F, F_F16, B, B_F16 = (f'{FOLDER}dcnv4_{name}.cu'
                      for name in ('forward_f32', 'forward_f16', 'backward_f32', 'backward_f16'))
T = ATTENTION + 'f32.cu'
ORDER, SIMPLE, SOFTMAX, RING, STRIDED, FIVE = (
    K + name for name in (
        'test_order_of_threads[24-3x3]', 'test_geometries[f32-3x3]',
        'test_geometries[f32-3x3-softmax]', 'test_geometries[f32-3x3-ring]',
        'test_geometries[f32-3x3-strided]', 'test_geometries[f32-5x5]'))
MANY, NAN, FIXED, LAUNCHES, PLANS, PADDING = (
    K + name for name in (
        'test_many_taps[f32]', 'test_pixels_that_are_nan[3x3-f32]', 'test_fixed_point[3x3-f32]',
        'test_several_launches', 'test_launch_plans', 'test_padding_has_no_gradient'))
ODD, ENCODER, VERY_WIDE, TINY = (A + f'test_sizes[{name}-f32]'
                                 for name in ('odd', 'encoder', 'very-wide', 'tiny-levels'))
FOUR_FLOATS, FOUR_HALVES, ONE_BY_ONE, TWO_ROWS, FOUR_ROWS = (
    K + f'test_reductions_fill_sectors[{name}]'
    for name in ('forward-32-f32', 'forward-32-f16', 'forward-at-once-32-f32',
                 'forward-at-once-16-f32', 'forward-at-once-8-f32'))
SAMPLES_ONE_BY_ONE = A + 'test_reductions_fill_sectors[forward-at-once-f32-4]'
NAN_SAMPLES = tuple(A + f'test_nan_stays_where_it_is_sampled[{name}-False]'
                    for name in ('tiny-levels', 'encoder'))
MANY_POINTS = A + 'test_sizes[many-points-f32]'

READ = ('all that a thread reads goes into the sums over its team, whose shuffles come before the '
        'write; the barrier says so to the reader, and to racecheck')


def fault(name, file, right, wrong, unit, *tests, equivalent=''):
    return Fault(name, file, right, wrong, tests, (unit,), equivalent)


def barrier(name, file, right, unit, *tests, equivalent=''):
    """Without the barrier that `right` contains."""
    wrong = right.replace('__syncwarp();', ';')
    return Fault(f'no barrier: {name}', file, right, wrong, tests, (unit,), equivalent)


DIRECT = [
    barrier('coefficients are written, then read (forward)', FORWARD,
            'packed, first, slots, taps);\n    __syncwarp();\n', F, ORDER),
    barrier('coefficients are read, then overwritten (forward)', FORWARD,
            'int32_t slots) {\n    __syncwarp();\n', F, MANY),
    barrier('coefficients are written, then read (backward)', BACKWARD,
            '                                        taps);\n      __syncwarp();\n', B, SIMPLE),
    barrier('coefficients are read, then overwritten (backward)', BACKWARD,
            'kTapsPerPass;\n      __syncwarp();\n', B, MANY),
    barrier('the team has read what is overwritten', BACKWARD,
            '        __syncwarp(); // the team has read what is overwritten\n', B, ORDER,
            equivalent=READ),
    barrier('gradients are collected, then written', BACKWARD,
            '      __syncwarp();\n      if (row.is_valid && (!kMaybeSoftmax', B, SIMPLE),
    fault('taps without a pixel read the first', FORWARD,
          'if (missing & 1) taps.pixel[slot] = make_uint4(sampled, sampled, sampled, sampled);',
          ';', F, NAN),
    fault('a tap after the last', FORWARD, 'if (row.is_valid && first + slot < a.points) {',
          'if (row.is_valid && first + slot <= a.points) {', F, SIMPLE,
          K + 'test_geometries[f32-5x5]'),
    fault('second launch: offsets of the first image', BACKWARD, 'offset_mask.from(packed_begin),',
          'offset_mask,', B, LAUNCHES),
    fault('second launch: output of the first image', FORWARD,
          '             output + image * p.queries() * p.channels());',
          '             output);', F, LAUNCHES),
    fault('softmax without the mean', BACKWARD, 'mask * (sum.mask - expected)', 'mask * sum.mask',
          B, SOFTMAX),
    fault('the mean of one thread', BACKWARD, '    expected = team_sum(expected, team);\n', '', B,
          SOFTMAX),
    fault('scatters twice', BACKWARD, 'take_tap(!kMaybeSoftmax || is_last, a,', 'take_tap(true, a,',
          B, SOFTMAX),
    fault('padding is what was in memory (direct)', BACKWARD,
          'i += team) to.store(T(0), 3 * a.points + i);', 'i += team) ;', B_F16, PADDING),
    fault('padding after every group', BACKWARD,
          'if (row.group + 1 < a.groups || first + count < a.points) return;',
          'if (first + count < a.points) return;', B, ORDER),
    fault('the first channels of grad_output for all', GATHER,
          'if (channels.step < channels.end)', 'if (false)', B, K + 'test_order_of_threads[70-3x3]',
          K + 'test_sizes[2x3x11x2x70-f32]'),
    fault('corners that do not exist', SAMPLING, 'uint32_t(b.has_x1 & b.has_y0) << 1',
          'uint32_t(b.has_x0 & b.has_y0) << 1', B, SIMPLE),
    fault('the tap that is removed is another', SAMPLING, 'int32_t(k >= a.removed_tap)',
          'int32_t(k > a.removed_tap)', F, RING),
    fault('corner pixels of the lower line', SAMPLING,
          'top + uint32_t(b.x1), bottom + uint32_t(b.x0)', 'top + uint32_t(b.x1), bottom', F,
          SIMPLE),
    fault('softmax: logits of other threads', SAMPLING,
          'return {largest, T(1) / team_sum(total, team)};', 'return {largest, T(1) / total};', F,
          SOFTMAX),
    fault('softmax without the largest logit', SAMPLING,
          'largest = other > largest ? other : largest;', ';', F, SOFTMAX),
    fault('dilation of the other axis', ARGUMENTS, 'T(p.dilation_h);', 'T(p.dilation_w);', F,
          STRIDED),
    fault('stride of the other axis', ARGUMENTS, 'a.stride_x = T(p.stride_w);',
          'a.stride_x = T(p.stride_h);', F, STRIDED),
    fault('padding of the other axis (direct)', ARGUMENTS, 'T(p.center_w() - p.pad_w);',
          'T(p.center_w() - p.pad_h);', F, STRIDED),
    fault('division rounds down', ARGUMENTS, '/ divisor + 1);', '/ divisor);', F, SIMPLE,
          K + 'test_sizes[3x5x7x3x16-f32]'),
    fault('rows below the last', ARGUMENTS, ' && row.x < a.out_width && row.y < a.out_height;',
          ' && row.x < a.out_width;', F, SIMPLE),
    fault('groups after the last', ARGUMENTS, 'row.is_valid = row.group < a.groups &&',
          'row.is_valid = row.group <= a.groups &&', F, K + 'test_sizes[2x3x3x33x4-f32]'),
    fault('the mask of the first tap', OFFSETS, 'Wide(from[2 * points + k])};',
          'Wide(from[2 * points])};', F_F16, K + 'test_geometries[f16-f32-3x3]'),
    fault('number bytes of the value', OFFSETS, 'return {data + at * number_bytes(), are_float};',
          'return {data + at * int64_t(sizeof(T)), are_float};', F_F16,
          K + 'test_geometries[f16-f32-3x3]'),
    fault('a number is added twice', VECTORS, 'from[i + 2], from[i + 3]);',
          'from[i + 2], from[i + 2]);', B, FOUR_FLOATS),
    fault('one by one, but of its own channels', VECTORS,
          'return {begin + lane, threads < team ? threads : team};',
          'return {begin + lane * vec, 1};', B, ONE_BY_ONE),
    fault('one by one, threads without channels as well', VECTORS,
          'threads < team ? threads : team', 'team', B, K + 'test_order_of_threads[70-3x3]'),
    fault('one by one, the channels of the first step', BACKWARD, '&& first_ != to.first) {',
          '&& first_ < 0) {', B, K + 'test_order_of_threads[70-3x3]'),
    fault('one by one, each team for itself', BACKWARD,
          'while (kTogether >> rows_log2_ > 1 << a.team_log2)', 'while (false)', B, TWO_ROWS),
    fault('one by one, the numbers of the first row', BACKWARD, '      take_next();\n', '', B,
          TWO_ROWS),
    fault('one by one, its own taps for all rows', BACKWARD,
          'slot + (other - row.index) * kTapsPerPass;', 'slot;', B, TWO_ROWS),
    fault('one by one, its own group for all rows', BACKWARD,
          '((other & groups) - (row.index & groups)) * a.group_channels + first_;', 'first_;', B,
          TWO_ROWS),
    fault('one by one, rows that do not exist are read', BACKWARD,
          'if (rows_log2_ == 0 && bits == 0) return;', ';', B_F16,
          K + 'test_rows_that_do_not_exist_read_nothing[forward-at-once-32-f16]'),
    fault('one by one, rows of other teams', BACKWARD, 'row.index - place + (i', 'row.index + (i',
          B, FOUR_ROWS),
    fault('fixed point: what is not finite is left out', VECTORS,
          '        reduce_add(not_finite + at + i, from[i]);\n', '', B,
          K + 'test_fixed_point_of_hostile_numbers'),
    fault('fixed point: rounded before it is scaled', VECTORS,
          'round_to_integer(double(from[i]) * *scale)',
          'round_to_integer(double(from[i])) * int64_t(*scale)', B, FIXED),
    fault('upper corner past the last', BILINEAR,
          'static_cast<uint32_t>(base + 1) < static_cast<uint32_t>(size);',
          'static_cast<uint32_t>(base) < static_cast<uint32_t>(size);', B, SIMPLE),
    fault('vectors that are not aligned', PLAN, ' && request.alignment % bytes == 0)', ')', PLAN,
          K + 'test_alignment[1-f32]'),
    fault('a block too many in a launch', LIMITS, 'limits.blocks_per_launch / blocks));',
          'limits.blocks_per_launch / blocks + 1));', PLAN, LAUNCHES),
    fault('more channels per thread than a reduction adds', PLAN,
          '    if (request.backward && vec > kMostAdded) continue;\n', '', PLAN, FOUR_HALVES),
    fault('half of the shared memory', PLAN, 'plan.shared_bytes = rows * kTapsPerPass *',
          'plan.shared_bytes = rows / 2 * kTapsPerPass *', PLAN, SIMPLE),
    fault('tiles of the input', PLAN, 'plan.tiles_h = divide_up(p.out_height, plan.tile_h);',
          'plan.tiles_h = divide_up(p.height, plan.tile_h);', PLAN, PLANS,
          K + 'test_geometries[f32-3x3-softmax]'),
    fault('window tiles of the output', WINDOW_PLAN, 'plan.is_mirrored ? p.height : p.out_height',
          'p.out_height', WINDOW_PLAN,
          'tests/cuda/test_window_backward.py::test_maps_of_two_sizes[0]'),
]

ATTENTION_FAULTS = [
    barrier('samples are written, then read (forward)', ATTENTION + 'forward.cuh',
            'slots, weight, pixel);\n        __syncwarp();\n', T, *NAN_SAMPLES),
    barrier('samples are read, then overwritten (forward)', ATTENTION + 'forward.cuh',
            '// else they are still there\n        __syncwarp();\n', T, MANY_POINTS),
    barrier('samples are written, then read (backward)', ATTENTION + 'backward.cuh',
            'count, lane, samples);\n  __syncwarp();\n', T, ENCODER),
    barrier('a sample is read, then overwritten', ATTENTION + 'backward.cuh',
            '      __syncwarp(); // the team has read what is overwritten\n', T, ENCODER, ODD,
            VERY_WIDE, equivalent=READ),
    barrier('gradients of samples are collected, then written', ATTENTION + 'backward.cuh',
            '  __syncwarp();\n  write_sample_grads(', T, ENCODER),
    fault('all corners go on to the next cell', ATTENTION + 'backward.cuh',
          'touched = touched >> 1 & 5;', 'touched = touched >> 1;', T, ENCODER, ODD, equivalent=(
              'a pixel gets a sum of zero; it exists, since one on the next line was touched')),
    fault('the next cell may be on the next line', ATTENTION + 'backward.cuh',
          'words.x == cell + 1 && (bits & kHasNextX);', 'words.x == cell + 1;', T, ENCODER, ODD,
          TINY),
    fault('sums are added again', ATTENTION + 'backward.cuh',
          'for (int i = 0; i < kVec; ++i) sum[corner][i] = W(0);', ';', T, ENCODER),
    fault('the last cell is left out', ATTENTION + 'backward.cuh',
          '    run.finish(a, grad_value);\n', '', T, ENCODER),
    fault('one by one, sums of other channels', ATTENTION + 'backward.cuh',
          'to[i] = load_one(row + added.first + i * added.pitch);', 'to[i] = own[i];', T,
          SAMPLES_ONE_BY_ONE),
    fault('one by one, added to other channels', ATTENTION + 'backward.cuh',
          'offset(a, corner) + added.first - channel;', 'offset(a, corner);', T,
          SAMPLES_ONE_BY_ONE),
    fault('height for width', ATTENTION + 'backward.cuh', 'T(level.width) * sums.y',
          'T(level.height) * sums.y', T, ODD),
    fault('derivative before the first pixel', ATTENTION + 'backward.cuh',
          'dx = own & kIsBeforeX ? W(1) : W(-1),', 'dx = W(-1),', T, ODD),
    fault('sums of the last step alone', ATTENTION + 'backward.cuh', 'if (begin > 0) {',
          'if (begin > step) {', T, VERY_WIDE),
    fault('gradient of the sample before', ATTENTION + 'backward.cuh',
          'samples.words[slot + 1].z) *', 'samples.words[slot].z) *', T, ENCODER),
    fault('levels begin at the first pixel', ATTENTION + 'forward.cuh',
          'uint32_t(level.start + b.y0 * level.width)', 'uint32_t(b.y0 * level.width)', T, ODD),
    fault('samples without a pixel read the first', ATTENTION + 'forward.cuh',
          'if (missing & 1) pixel[slot] = make_uint4(sampled, sampled, sampled, sampled);', ';', T,
          *NAN_SAMPLES),
    fault('second launch: locations of the first images', ATTENTION + 'forward.cuh',
          'locations.from(first_row * 2 * p.samples())', 'locations', T,
          A + 'test_few_images_per_launch[1]'),
    fault('ranks from one', ATTENTION + 'sort.cuh', 'order[ends[cell] - 1 - ranks[sample]]',
          'order[ends[cell] - ranks[sample]]', T, ENCODER),
    fault('gradients of samples outside are not written', ATTENTION + 'sort.cuh',
          '    to.store(0, 1);\n', '', T, ODD),
    fault('cells of the first head', ATTENTION + 'samples.cuh',
          '(image * uint32_t(a.heads) + row) * a.pixels', '(image * uint32_t(a.heads)) * a.pixels',
          T, ODD),
    fault('centres on the corners', ATTENTION + 'samples.cuh', 'T(level.height) - T(0.5);',
          'T(level.height);', T, ODD),
]

FAULTS = [*DIRECT, *ATTENTION_FAULTS]
