# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in the CPU kernels; mutations.py tries them, with the instruction set of any processor."""

from __future__ import annotations

from helpers.faults import Fault

FOLDER = 'csrc/cpu/'
TAPS, FORWARD, BACKWARD, VEC, HOST, SAMPLES, ATTN_FORWARD, ATTN_BACKWARD = (
    FOLDER + name for name in (
        'dcnv4_taps.inl', 'dcnv4_forward.inl', 'dcnv4_backward.inl', 'vec.h', 'dcnv4_cpu.cpp',
        'ms_deform_attn_samples.inl', 'ms_deform_attn_forward.inl',
        'ms_deform_attn_backward.inl'))
F, B, A = (f'tests/ops/test_{name}.py::' for name in (
    'dcnv4_forward', 'dcnv4_backward', 'multi_scale_attention'))
KERNELS = FOLDER + 'kernels_generic.cpp'
SIMPLE, BACK, EQUAL = F + 'test_geometries', B + 'test_geometries', A + 'test_equals_mmcv'


def fault(name, file, right, wrong, *tests, unit=KERNELS, equivalent=''):
    return Fault(name, file, right, wrong, tests, (unit,), equivalent)


FAULTS = [
    fault('offsets of x and y exchanged', TAPS, '      dx[k] = from[2 * k];\n'
          '      dy[k] = from[2 * k + 1];', '      dy[k] = from[2 * k];\n'
          '      dx[k] = from[2 * k + 1];', SIMPLE),
    fault('groups one number apart', TAPS, 'from = packed + g * 3 * points;',
          'from = packed + g * (3 * points + 1);', SIMPLE),
    fault('one mask too few', TAPS, 'from + 2 * points, points * sizeof(T));',
          'from + 2 * points, (points - 1) * sizeof(T));', SIMPLE),
    fault('softmax without its sum', TAPS, 'logits[k] /= total;', 'logits[k] /= T(1);', SIMPLE),
    fault('softmax without the largest logit (CPU)', TAPS,
          'largest = logits[k] > largest ? logits[k] : largest;', ';',
          F + 'test_softmax_of_large_logits'),
    fault('positions of a block one pixel apart', TAPS,
          '(*this)[Tap::kColumn][s] = T(position * p.stride_w);',
          '(*this)[Tap::kColumn][s] = T(position);', SIMPLE),
    fault('dilation of the other axis (CPU)', TAPS, 'T(int64_t(j) * p.dilation_h - p.center_h());',
          'T(int64_t(j) * p.dilation_w - p.center_h());', SIMPLE),
    fault('padding of the other axis (CPU)', TAPS,
          'return T(column * p.stride_w - p.pad_w + p.center_w());',
          'return T(column * p.stride_w - p.pad_h + p.center_w());', SIMPLE),
    fault('an interior tap on the last column', TAPS, '(x0 | (width - 2 - x0))',
          '(x0 | (width - 1 - x0))', F + 'test_one_tap_strays_over_a_border'),
    fault('an interior tap before the first line', TAPS, '| (y0 | (height - 2 - y0));',
          '| (height - 2 - y0);', F + 'test_one_tap_strays_over_a_border'),
    fault('a missing corner to the right is read', TAPS,
          'return {(corners & kBothX) == kBothX ? right : 0,', 'return {right,', SIMPLE,
          F + 'test_a_bad_pixel_beside_a_missing_corner'),
    fault('taps without a column count', TAPS,
          'return (corners & kBothX) && (corners & kBothY);', 'return (corners & kBothY) != 0;',
          F + 'test_samples_outside_along_one_axis_read_nothing'),
    fault('interior rows by one tap', TAPS, 'all &= corners[k];', 'all = corners[k];', BACK),
    fault('a guess of one pixel less', TAPS, 'kMargin = 2;', 'kMargin = 1;', SIMPLE,
          equivalent='only a guess whether to try: compute_interior_taps() tells whether it was '
                     'right'),
    fault('the next image', FORWARD, 'value + task / p.out_height * p.height',
          'value + task / p.out_width * p.height', SIMPLE),
    fault('a place without a corner has one', 'csrc/bilinear.h',
          'floor_of(position, T(-2), size, fraction)', 'floor_of(position, T(-1), size, fraction)',
          B + 'test_samples_nowhere_have_zero_gradients'),
    fault('one chain of sums is left out', FORWARD, 'for (int c = 1; c < kChains; ++c) total',
          'for (int c = 2; c < kChains; ++c) total', SIMPLE),
    fault('a block of groups reads the first', FORWARD, '+ first * 3 * taps.points;', ';',
          F + 'test_eighty_groups_of_sixteen', F + 'test_widths'),
    fault('dot products are not cleared', BACKWARD, '  taps.clear_dots();\n', '', BACK),
    fault('dot product of the first vector', BACKWARD,
          '      for (int v = 1; v < kVectors; ++v)\n        dot = dot',
          '      for (int v = 2; v < kVectors; ++v)\n        dot = dot', BACK),
    fault('softmax without the mean (CPU)', BACKWARD, '(to[2 * points + k] - expected);',
          '(to[2 * points + k]);', BACK),
    fault('gradient without the mask', BACKWARD, 'scale * mask * grad.y', 'scale * grad.y', BACK),
    fault('grad_value holds what was there', BACKWARD,
          '  clear_channels(p, grad_pixels + channel, channels);\n', '',
          B + 'test_every_element_is_written', B + 'test_gradients_are_written_whole', BACK),
    fault('padding holds what was there', BACKWARD,
          'std::memset(to + i * p.offset_mask_channels + used, 0,\n'
          '                    (p.offset_mask_channels - used) * sizeof(T));', ';',
          B + 'test_padding_channels_get_zero', B + 'test_every_element_is_written'),
    fault('the last channel is left out', VEC, 'for (; count - channel >= kVectors * kLanes;',
          'for (; count - channel > kVectors * kLanes;', SIMPLE, F + 'test_widths'),
    fault('the last groups of a thread', HOST, 'std::min(first + block, p.groups));',
          'first + block);', B + 'test_threads_do_not_change_a_bit', BACK, unit=HOST),
    fault('lines of one image', HOST, 'at::parallel_for(0, p.batch * p.out_height, grain,',
          'at::parallel_for(0, p.out_height, grain,', SIMPLE, unit=HOST),
    fault('half types are not widened', HOST,
          'return value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;',
          'return value.scalar_type() == at::kDouble ? at::kFloat : at::kFloat;', SIMPLE,
          unit=HOST),
    fault('attention: levels of single samples', SAMPLES, 's / p.points % p.levels;',
          's % p.levels;', EQUAL),
    fault('attention: maps begin at the first pixel', SAMPLES,
          'bottom = start[s] + b.y1 * width[s];', 'bottom = b.y1 * width[s];', EQUAL),
    fault('attention: centres on the corners', SAMPLES, 'T(width[s]) - T(0.5),', 'T(width[s]),',
          EQUAL),
    fault('attention: samples outside are read', ATTN_FORWARD, 'if (!inside[s]) continue;', ';',
          A + 'test_a_pixel_that_is_not_sampled_is_not_read', EQUAL),
    fault('attention: weights of the first head', ATTN_FORWARD,
          'weights + query * block.size + first, block,', 'weights + query * block.size, block,',
          EQUAL),
    fault('attention: missing corners add', ATTN_BACKWARD, 'if (!block.has(c)[s]) continue;', ';',
          EQUAL),
    fault('attention: height for width', ATTN_BACKWARD, 'T(block[Sample::kWidth][s]) * weights',
          'T(block[Sample::kHeight][s]) * weights', EQUAL),
    fault('attention: sums of the query before', ATTN_BACKWARD,
          '    std::memset(dots, 0, 4 * block.size * sizeof(T));\n', '', EQUAL),
]
