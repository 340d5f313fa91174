# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Limits of the released DCNv4 kernel, row by row: each is absent here, and this is the proof.

Rows, with the tests that stand elsewhere:

==  ===========================================================================================
 1  kernels of 8 and 9 taps only
 2  a crash instead of a message for other kernels (`test_dcnv4_errors.py` has the other messages)
 3  abort when the number of queries does not divide into blocks
 4  wrong image for some queries of a batch
 5  80 groups of 16 channels (the released one exceeds the threads of a CUDA block)
 6  stride through the layer
 7  channels per group must be a multiple of 16
 8  batches above 256
 9  no device guard: about several CUDA devices; on one machine the tensors must share a device
10  no backward in bfloat16
11  no float64
12  mixed dtypes under autocast (all pairs: `test_dcnv4_library.py`)
13  half-precision offsets only
14  contiguity and alignment
15  32-bit indices
16  import without a GPU (`tests/test_import.py` imports without kernels as well)
17  does not compile with current PyTorch, nor without CUDA
18  no CPU kernel
19  launch errors are printed: about CUDA launches; here it is that errors are exceptions
20  a divisor search at every call, keyed too narrowly: there is no such table here; what remains
    is that a second call of other geometry is not answered with the plan of the first
21  no double backward, without a word
22  gradients that differ from run to run
23  output zero-filled, then overwritten: memory that held NaN before must not show
24  a token grid is guessed to be square
25  even depthwise kernels change the size of the map
26  a second form of DCNv4 in the package: out of scope; the namespace holds one, and the attention
    of BEVFormer v2
==  ===========================================================================================
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdcnv4.ops import DCNv4, _extension, dcnv4, dcnv4_reference
from mmdcnv4.testing import (
    Inputs,
    assert_accurate,
    assert_matches_reference,
    assert_within,
    error_bounds,
    forward_backward,
    make_inputs,
)

F32 = torch.float32
SAME = dict(kernel_size=3, padding=1)
BEYOND = 2**31

pytestmark = pytest.mark.usefixtures('native')


def assert_matches(batch, height, width, group_channels, dtype=F32, mask_dtype=None, **geometry):
    inputs = make_inputs(batch, height, width, group_channels, dtype=dtype, mask_dtype=mask_dtype,
                         **geometry)
    assert_matches_reference(dcnv4, inputs, **geometry)


@pytest.mark.parametrize('kernel_size', [1, 2, (1, 2), (2, 5), 4, (6, 1), 7])
def test_row_1_any_number_of_taps(kernel_size):
    assert_matches(2, 7, 9, 16, groups=2, kernel_size=kernel_size, padding=3)


def test_row_2_an_impossible_kernel_gets_a_message():
    with pytest.raises(ValueError, match='kernel_size must be >= 1, got .0, 3.'):
        dcnv4(torch.zeros(1, 5, 7, 16), torch.zeros(1, 5, 7, 8), kernel_size=(0, 3), groups=1)


@pytest.mark.parametrize('batch, height, width', [(1, 1, 1), (3, 13, 1), (5, 7, 11), (2, 17, 19)])
def test_row_3_number_of_queries_is_free(batch, height, width):
    assert_matches(batch, height, width, 16, groups=4, stride=(2, 1), **SAME)


def test_row_4_every_query_reads_its_own_image():
    """One released failure: B = 2, 50 x 84, 16 groups of 16. Constant images tell them apart."""
    value = torch.tensor([1., 100.])[:, None, None, None].expand(2, 50, 84, 256)
    offset_mask = torch.zeros(2, 50, 84, 432)
    offset_mask.view(2, 50, 84, 16, 27)[..., 18 + 4] = 1  # the centre tap
    assert torch.equal(dcnv4(value, offset_mask, groups=16, **SAME), value)


def test_row_5_eighty_groups_of_sixteen():
    assert_matches(1, 5, 3, 16, groups=80, **SAME)


@pytest.mark.parametrize('dw_kernel_size', [None, 3])
def test_row_6_stride_through_the_layer(dw_kernel_size):
    layer = DCNv4(32, group=2, stride=(2, 3), dw_kernel_size=dw_kernel_size, mask_init=0.1)
    x = torch.randn(2, 9, 11, 32, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 5, 4, 32)
    out.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize('group_channels', [1, 2, 5, 7, 9, 12, 17, 24, 33, 100])
def test_row_7_any_group_width(group_channels):
    assert_matches(2, 3, 5, group_channels, groups=3, **SAME)


@pytest.mark.parametrize('batch', [0, 257, 300])
def test_row_8_any_batch(batch):
    assert_matches(batch, 2, 3, 2, groups=2, **SAME)


def test_row_9_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match='offset_mask must be on the device of value'):
        dcnv4(torch.zeros(1, 5, 7, 4), torch.zeros(1, 5, 7, 32, device='meta'), groups=1, **SAME)


def test_row_10_backward_in_bfloat16():
    assert_matches(2, 5, 7, 16, torch.bfloat16, groups=2, **SAME)


def test_row_11_float64():
    assert_matches(2, 5, 7, 16, torch.float64, groups=2, **SAME)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_row_12_mixed_dtypes_under_autocast(dtype):
    """Without projections `value` is float32 while the linear predictor gives a half type."""
    layer = DCNv4(32, group=2, without_pointwise=True, mask_init=0.1)
    x = torch.randn(2, 5, 7, 32, requires_grad=True)
    with torch.autocast('cpu', dtype):
        out = layer(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert x.grad.dtype == F32


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_row_13_float32_offsets_beside_half_values(dtype):
    """A quarter pixel, 80 pixels away, on a ramp: a half offset cannot say it."""
    value = torch.arange(96.)[:, None].expand(1, 1, 96, 1).to(dtype)
    offset_mask = torch.zeros(1, 1, 96, 8)
    offset_mask[..., 0], offset_mask[..., 2] = 80.03125, 1
    out = dcnv4(value, offset_mask, kernel_size=1, groups=1)
    assert out.dtype == dtype
    assert out[0, 0, 0, 0] == torch.tensor(80.03125).to(dtype)
    narrow = dcnv4(value.float(), offset_mask.to(dtype), kernel_size=1, groups=1)
    assert abs(narrow[0, 0, 0, 0].item() - 80.03125) >= 1 / 32
    assert_matches(2, 5, 7, 16, dtype, F32, groups=2, **SAME)


def test_row_14_any_strides_and_alignment():
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(2, 5, 7, 16, dtype=F32, **geometry)
    expected = dcnv4(*inputs, **geometry)
    odd = [torch.cat([torch.zeros(3), t.flatten()])[3:].view(t.shape) for t in inputs]
    turned = [t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for t in inputs]
    assert odd[0].data_ptr() % 16 and not turned[0].is_contiguous()
    assert torch.equal(dcnv4(*odd, **geometry), expected)
    assert torch.equal(dcnv4(*turned, **geometry), expected)


def lazily_zero(*shape):
    """A tensor of zeros whose memory is used only where it is touched."""
    try:
        return torch.from_numpy(np.zeros(shape, np.float32))
    except MemoryError:
        pytest.skip(f'no {4 * math.prod(shape) / 2**30:.0f} GiB of address space')


def four_corners(height, width, channels):
    """A huge image with numbers in its corners alone, and the windows that see them.

    With stride (height - 3, width - 3) a 3 x 3 kernel has 2 x 2 windows, one in every corner.
    """
    value = lazily_zero(1, height, width, channels)
    for rows in (slice(0, 3), slice(height - 3, height)):
        for columns in (slice(0, 3), slice(width - 3, width)):
            value[:, rows, columns] = torch.randn(1, 3, 3, channels)
    # quarters are exact in float32 even at column 32768
    offset_mask = torch.randint(-3, 4, (1, 2, 2, 32)) / 4
    options = dict(kernel_size=3, groups=1, stride=(height - 3, width - 3))
    corners = torch.cat([torch.cat([value[:, r, c] for c in (slice(0, 3), slice(-3, None))], 2)
                         for r in (slice(0, 3), slice(-3, None))], 1)
    return value, offset_mask, options, corners


def windows_of_corners(offset_mask, corners):
    """Each corner alone; quarters and whole taps stay within it or its zeros."""
    for row in (0, 1):
        for column in (0, 1):
            at = slice(row, row + 1), slice(column, column + 1)
            window = corners[:, 3 * row:3 * row + 3, 3 * column:3 * column + 3]
            yield at, Inputs(window, offset_mask[:, at[0], at[1]])


def test_row_15_more_than_2_to_the_31_numbers_in_an_image(instruction_set):
    """Kernels with 64-bit element offsets; the memory is virtual, a few pages are touched."""
    value, offset_mask, options, corners = four_corners(32769, 1025, 64)
    assert value.numel() > BEYOND
    out = dcnv4(value, offset_mask, **options)
    options = dict(kernel_size=3, groups=1)
    for at, inputs in windows_of_corners(offset_mask, corners):
        exact = dcnv4_reference(inputs.value.double(), inputs.offset_mask.double(), **options)
        bound = error_bounds(inputs, out[:, at[0], at[1]], **options)[0]
        assert_within(out[:, at[0], at[1]], exact, bound)


def test_row_15_more_than_2_to_the_31_numbers_in_a_batch():
    value = lazily_zero(257, 1024, 128, 64)
    assert value.numel() > BEYOND and value[0].numel() < BEYOND
    value[256, 1023, 127], value[0, 0, 0] = torch.randn(64), torch.randn(64)
    offset_mask = torch.zeros(257, 2, 2, 8)
    offset_mask[..., 2] = 1
    out = dcnv4(value, offset_mask, kernel_size=1, groups=1, stride=(1023, 127))
    assert torch.equal(out[256, 1, 1], value[256, 1023, 127])
    assert torch.equal(out[0, 0, 0], value[0, 0, 0])
    assert out.count_nonzero() == 128


@pytest.mark.slow
def test_row_15_backward_with_more_than_2_to_the_31_numbers():
    """The gradient of `value` is written whole: this needs 9 GiB of memory."""
    value, offset_mask, options, corners = four_corners(32769, 1025, 64)
    grad_output = torch.randn(1, 2, 2, 64)
    grad_value, grad = torch.ops.mmdcnv4._dcnv4_backward(
        grad_output, value, offset_mask, [3, 3], 1, options['stride'], [0, 0], [1, 1], 1.0, False,
        False)
    for at, inputs in windows_of_corners(offset_mask, corners):
        inner = grad_value[:, -3 * at[0].start:, -3 * at[1].start:][:, :3, :3]
        assert_accurate([None, inner, grad[:, at[0], at[1]]], inputs, grad_output[:, at[0], at[1]],
                        kernel_size=3, groups=1)


def test_row_16_import_asks_for_no_device():
    code = ('import sys, torch\n'
            'for name in ("mmengine", "mmcv", "mmdet", "mmseg", "mmdet3d"):\n'
            '    sys.modules[name] = None\n'  # mmengine asks; this package must not
            'def refuse(*a, **k): raise AssertionError("a device was asked for")\n'
            'for name in ("get_device_capability", "get_device_properties", "device_count",\n'
            '             "is_available", "init", "_lazy_init"):\n'
            '    setattr(torch.cuda, name, refuse)\n'
            'import mmdcnv4.ops\n')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            cwd=Path(__file__).parents[2], timeout=120)
    assert result.returncode == 0, result.stderr


def test_row_17_is_compiled_for_this_torch():
    assert _extension.missing_reason is None
    assert 'cpu' in _extension.build_info


def test_row_18_runs_on_the_cpu():
    assert torch._C._dispatch_has_kernel_for_dispatch_key('mmdcnv4::dcnv4', 'CPU')
    assert torch._C._dispatch_has_kernel_for_dispatch_key('mmdcnv4::_dcnv4_backward', 'CPU')


def test_row_19_errors_are_exceptions_with_context(capfd):
    with pytest.raises(ValueError, match='offset_mask must have shape'):
        torch.ops.mmdcnv4.dcnv4(torch.zeros(1, 5, 7, 4), torch.zeros(1, 5, 7, 40), [3, 3], 1,
                                [1, 1], [1, 1], [1, 1], 1.0, False, False)
    assert capfd.readouterr() == ('', '')


def test_row_20_calls_do_not_remember_each_other():
    """The same B, H, W, G, D with other kernels, strides and dtypes, to and fro."""
    for _ in range(2):
        for kernel_size, stride in ((3, 1), (5, 1), (3, 2)):
            for dtype in (F32, torch.float64):
                assert_matches(2, 5, 7, 4, dtype, groups=2, kernel_size=kernel_size, padding=2,
                               stride=stride)


def test_row_21_double_backward_is_refused_or_right():
    x = torch.randn(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    offset_mask = make_inputs(1, 3, 3, 4, groups=1, **SAME).offset_mask
    for backend in ('native', 'pytorch'):
        out = dcnv4(x, offset_mask.requires_grad_(), groups=1, backend=backend, **SAME)
        grad, = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        if backend == 'native':
            with pytest.raises(NotImplementedError, match="use backend='pytorch'"):
                grad.sum().backward()
        else:
            grad.sum().backward()
            assert x.grad.abs().sum() > 0


def test_row_22_gradients_are_deterministic():
    """All samples fall on a few pixels, where atomics would meet in any order."""
    value = torch.randn(1, 16, 16, 32, requires_grad=True)
    offset_mask = torch.randn(1, 16, 16, 56)
    offset_mask[..., :54].view(1, 16, 16, 2, 27)[..., :18] *= 5
    offset_mask.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(dcnv4(value, offset_mask, groups=2, **SAME).square().sum(),
                                    (value, offset_mask)) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, runs[0] * 4, sum(runs[1:], ())))


def test_row_23_every_element_is_written():
    """torch fills new memory with NaN here; none of it may be left in a result."""
    inputs = make_inputs(2, 5, 7, 5, groups=3, dtype=F32, **SAME)
    torch.use_deterministic_algorithms(True)
    previous, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True)
    try:
        assert torch.empty(4).isnan().all()
        results = forward_backward(dcnv4, inputs, torch.randn(2, 5, 7, 15), groups=3, **SAME)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = previous
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)


def test_row_24_no_grid_is_guessed_from_tokens():
    with pytest.raises(ValueError, match=r'x must have shape \(N, H, W, 16\), got \(2, 49, 16\)'):
        DCNv4(16, group=1)(torch.zeros(2, 49, 16))


@pytest.mark.parametrize('dw_kernel_size', [2, 4])
def test_row_25_even_depthwise_kernels_are_refused(dw_kernel_size):
    with pytest.raises(ValueError, match='dw_kernel_size must be odd'):
        DCNv4(16, group=1, dw_kernel_size=dw_kernel_size)


def test_row_26_the_namespace_holds_one_form_of_dcnv4():
    names = {schema.name.split('::')[1] for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith('mmdcnv4::')}
    assert {name for name in names if not name.startswith('_')} == {
        'dcnv4', 'ms_deform_attn'}
