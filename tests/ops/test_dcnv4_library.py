# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What joins the kernels to PyTorch: opcheck, shapes, autocast, compile, export, backends."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

from helpers.fresh import execute_again
from mmdcnv4.ops import DCNv4, dcnv4, dcnv4_reference, functional, get_backend, use_backend
from mmdcnv4.testing import GEOMETRIES, make_inputs

SAME = dict(kernel_size=3, padding=1, groups=2)
SCALARS = ([3, 3], 2, [2, 1], [1, 0], [1, 2], 0.5, False, False)  # of '3x3-strided', s = 0.5
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

pytestmark = pytest.mark.usefixtures('native')


def strided_inputs(dtype=F32, mask_dtype=None, **options):
    return make_inputs(2, 5, 7, 4, groups=2, dtype=dtype, mask_dtype=mask_dtype, offset_scale=0.5,
                       **GEOMETRIES['3x3-strided'], **options)


@pytest.mark.parametrize('dtype, mask_dtype', [(F64, F64), (F32, F32), (BF16, F32)])
def test_opcheck(dtype, mask_dtype):
    inputs = strided_inputs(dtype, mask_dtype)
    torch.library.opcheck(torch.ops.mmdcnv4.dcnv4.default,
                          (*inputs.leaves(dtype, mask_dtype), *SCALARS))
    grad_output = torch.randn(2, 3, 3, 8, dtype=F64).to(dtype)
    torch.library.opcheck(torch.ops.mmdcnv4._dcnv4_backward.default,
                          (grad_output, *inputs, *SCALARS))


@pytest.mark.parametrize('name', GEOMETRIES)
def test_meta_tensors_have_the_shape_of_real_ones(name):
    geometry = dict(groups=2, **GEOMETRIES[name])
    inputs = make_inputs(3, 9, 7, 4, dtype=F32, **geometry)
    expected = dcnv4(*inputs, **geometry)
    value, offset_mask = (tensor.to('meta').requires_grad_() for tensor in inputs)
    out = dcnv4(value, offset_mask, **geometry)
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, F32, 'meta')
    assert out.stride() == expected.stride()
    out.sum().backward()
    assert value.grad.shape == value.shape
    assert offset_mask.grad.shape == offset_mask.shape


def test_meta_shape_of_an_expanded_value_is_contiguous_too():
    value = torch.randn(1, 5, 7, 6).expand(3, -1, -1, -1).requires_grad_()
    offset_mask = torch.randn(3, 5, 7, 56)
    for device in ('cpu', 'meta'):
        out = dcnv4(value.detach().to(device).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
                    offset_mask.to(device), **SAME)
        assert out.stride() == (5 * 7 * 6, 7 * 6, 6, 1), device


def run_operator(value, offset_mask):
    return torch.ops.mmdcnv4.dcnv4(value, offset_mask, *SCALARS)


def run_function(value, offset_mask, backend='native'):
    return dcnv4(value, offset_mask, offset_scale=0.5, groups=2, backend=backend,
                 **GEOMETRIES['3x3-strided'])


def run_pytorch(value, offset_mask):
    return run_function(value, offset_mask, 'pytorch')


@pytest.mark.parametrize('call', [run_operator, run_function, run_pytorch])
@pytest.mark.parametrize('dtype', [BF16, F16])
@pytest.mark.parametrize('value_dtype, mask_dtype', [(F32, F32), (F32, 'same'), ('same', F32),
                                                     ('same', 'same'), ('other', 'other')])
def test_autocast(call, dtype, value_dtype, mask_dtype):
    """`value` is cast, a float32 `offset_mask` is kept; gradients return in the callers' dtypes."""
    names = dict(same=dtype, other=F16 if dtype == BF16 else BF16)
    value_dtype = names.get(value_dtype, value_dtype)
    mask_dtype = names.get(mask_dtype, mask_dtype)
    inputs = strided_inputs(value_dtype, mask_dtype).leaves(value_dtype, mask_dtype)
    with torch.autocast('cpu', dtype):
        out = call(*inputs)
    assert out.dtype == dtype
    kept = inputs.offset_mask if mask_dtype == F32 else inputs.offset_mask.to(dtype)
    expected = dcnv4_reference(inputs.value.to(dtype), kept, offset_scale=0.5, groups=2,
                               **GEOMETRIES['3x3-strided'])
    # both are rounded once from float32 sums of different order: at most one step of the dtype
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    out.float().pow(2).sum().backward()
    assert inputs.value.grad.dtype == value_dtype
    assert inputs.offset_mask.grad.dtype == mask_dtype
    assert inputs.value.grad.abs().sum() > 0


def test_autocast_leaves_float64_alone():
    inputs = strided_inputs(F64)
    with torch.autocast('cpu', BF16):
        assert torch.equal(run_operator(*inputs), run_function(*inputs))
        assert run_function(*inputs).dtype == F64
        assert run_function(inputs.value, inputs.offset_mask.float()).dtype == F64


class Layer(nn.Module):
    """The operator between two projections, as models use it."""

    def __init__(self, dw_kernel_size=3):
        super().__init__()
        self.layer = DCNv4(8, group=2, stride=(2, 1), dw_kernel_size=dw_kernel_size, mask_init=0.3)

    def forward(self, x):
        return self.layer(x).relu()


def train_step(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().mean().backward()
    return out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())


def assert_compiles(backend, sizes, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Layer(**options)
    nn.init.normal_(model.layer.offset_mask.weight, std=0.3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, height, width in sizes:
        x = torch.randn(batch, height, width, 8)
        for actual, expected in zip(train_step(compiled, x), train_step(model, x)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    frames = torch._dynamo.utils.counters['frames']
    assert frames['ok'] == frames['total'] and frames['ok'] <= 2
    torch._dynamo.reset()


def test_compile_with_dynamic_shapes():
    assert_compiles('aot_eager', [(2, 9, 7), (3, 13, 10), (2, 6, 21)])


@pytest.mark.slow
def test_compile_with_inductor():
    # without the depthwise convolution: inductor of torch 2.13 cannot order the symbolic strides
    # of a permuted view that is kept for the backward pass
    assert_compiles('inductor', [(2, 9, 7), (3, 13, 10)], dw_kernel_size=None)


def test_compile_under_autocast():
    torch._dynamo.reset()
    model = Layer()

    def step(x):
        with torch.autocast('cpu', BF16):
            return model(x)

    x = torch.randn(2, 9, 7, 8)
    compiled = torch.compile(step, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), step(x))
    assert compiled(x).dtype == BF16


def test_compile_of_the_pytorch_backend():
    torch._dynamo.reset()
    inputs = strided_inputs()
    compiled = torch.compile(run_pytorch, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(*inputs), run_pytorch(*inputs))


@pytest.mark.skipif(torch.__version__ < (2, 5),
                    reason='the exporter of torch 2.4 fails on inequalities between sizes')
def test_export_with_dynamic_height_and_width():
    model = Layer().eval()
    nn.init.normal_(model.layer.offset_mask.weight, std=0.3)
    height, width = torch.export.Dim('height', min=4), torch.export.Dim('width', min=4)
    program = torch.export.export(model, (torch.randn(2, 9, 7, 8),),
                                  dynamic_shapes={'x': {1: height, 2: width}})
    targets = [str(node.target) for node in program.graph.nodes]
    assert 'mmdcnv4.dcnv4.default' in targets
    for size in ((9, 7), (12, 30), (31, 5)):
        x = torch.randn(2, *size, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def double_backward(backend):
    inputs = strided_inputs(F64).leaves(F64, F64)
    out = run_function(*inputs, backend=backend)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)


def test_double_backward_says_what_to_do():
    with pytest.raises(NotImplementedError, match="no double backward; use backend='pytorch'"):
        double_backward('native')


def test_double_backward_of_the_pytorch_backend():
    assert all(grad.isfinite().all() and grad.abs().sum() > 0
               for grad in double_backward('pytorch'))


def test_vmap_gives_the_same_values():
    inputs = [torch.stack([tensor, tensor.flip(0)]) for tensor in strided_inputs()]
    out = torch.func.vmap(run_function)(*inputs)
    for n in range(2):
        assert torch.equal(out[n], run_function(inputs[0][n], inputs[1][n]))


def calls_native(function):
    """Whether the compiled operator ran, seen from the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return 'mmdcnv4.dcnv4.default' in seen


def test_backend_argument_and_context(monkeypatch):
    inputs = strided_inputs()
    monkeypatch.setattr(functional, '_from_environment', 'auto')

    def call(backend=None):
        return run_function(*inputs, backend=backend)

    assert get_backend() == 'auto'
    assert calls_native(call)
    assert not calls_native(lambda: call('pytorch'))
    with use_backend('pytorch'):
        assert get_backend() == 'pytorch'
        assert not calls_native(call)
        assert calls_native(lambda: call('native'))
        with use_backend('auto'):
            assert calls_native(call)
        assert get_backend() == 'pytorch'
    with pytest.raises(KeyError), use_backend('pytorch'):
        raise KeyError
    assert get_backend() == 'auto'
    monkeypatch.setattr(functional, '_from_environment', 'pytorch')
    assert not calls_native(call)
    with use_backend('native'):
        assert calls_native(call)


def test_threads_choose_their_backends_apart(monkeypatch):
    """Two blocks that overlap: each sees its own choice, and nothing stays in force."""
    monkeypatch.setattr(functional, '_from_environment', 'auto')
    entered, inner, left = threading.Event(), threading.Event(), threading.Event()
    seen = {}

    def first():
        with use_backend('pytorch'):
            entered.set()
            assert inner.wait(60)
            seen['first'] = get_backend()
        left.set()

    def second():
        assert entered.wait(60)
        seen['before'] = get_backend()
        with use_backend('native'):
            inner.set()
            assert left.wait(60)
            seen['second'] = get_backend()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == dict(before='auto', first='pytorch', second='native')
    assert get_backend() == 'auto' and functional._override_of_traces is None


def test_unknown_backends(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of .* got 'fast'"):
        run_function(*strided_inputs(), backend='fast')
    with pytest.raises(ValueError, match="backend must be one of .* got 'fast'"), \
            use_backend('fast'):
        pass
    monkeypatch.setattr(functional, '_from_environment', 'fast')
    with pytest.raises(ValueError, match="MMDCNV4_BACKEND must be one of .* got 'fast'"):
        run_function(*strided_inputs(), backend=None)


def test_environment_variable(monkeypatch):
    for value, expected in (('pytorch', 'pytorch'), ('', 'auto')):  # empty: as if not set
        monkeypatch.setenv('MMDCNV4_BACKEND', value)
        assert execute_again(functional).get_backend() == expected


def test_forward_mode_derivative_takes_the_pytorch_path():
    # the compiled kernels have none; a zero tangent without an error would be worse than slow
    value = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    offset_mask = torch.randn(2, 3, 5, 32, dtype=torch.float64)

    def call(value):
        return dcnv4(value, offset_mask, kernel_size=3, groups=1, padding=1)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        out, tangent = torch.func.jvp(call, (value,), (value,))
    torch.testing.assert_close(tangent, out)  # the operator is linear in value
    with pytest.raises(NotImplementedError, match='forward-mode'):
        torch.func.jvp(lambda v: dcnv4(v, offset_mask, kernel_size=3, groups=1, padding=1,
                                       backend='native'), (value,), (value,))


@pytest.mark.parametrize('transform', ['grad', 'jacrev', 'per sample'])
def test_reverse_mode_of_torch_func_takes_the_pytorch_path(transform):
    # torch's own error would be about autograd.Function and setup_context
    value = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    offset_mask = torch.randn(2, 3, 5, 32, dtype=torch.float64)

    def total(value, offset_mask, **options):
        return dcnv4(value, offset_mask, kernel_size=3, groups=1, padding=1,
                     **options).square().sum()

    leaf = value.clone().requires_grad_()
    expected, = torch.autograd.grad(total(leaf, offset_mask), leaf)
    derive = torch.func.jacrev if transform == 'jacrev' else torch.func.grad
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        if transform == 'per sample':
            grad = torch.func.vmap(derive(lambda v, o: total(v[None], o[None])))(value, offset_mask)
        else:
            grad = derive(total)(value, offset_mask)
    torch.testing.assert_close(grad, expected)
    with pytest.raises(NotImplementedError, match='no form for torch.func.grad'):
        derive(lambda v: total(v, offset_mask, backend='native'))(value)


def test_the_namespace_holds_one_form_of_dcnv4():
    names = {schema.name.split('::')[1] for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith('mmdcnv4::')}
    assert {name for name in names if not name.startswith('_')} == {
        'dcnv4', 'ms_deform_attn'}
