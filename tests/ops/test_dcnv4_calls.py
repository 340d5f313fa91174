# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The two ways from Python into the compiled operator: which call takes which, and that both agree.

The short way is `mmdcnv4._C.dcnv4`, for plain arguments; the long way is `torch.ops`, for the rest.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from helpers.bad_calls import BOTH, arguments, names
from helpers.fresh import execute_again
from mmdcnv4.ops import DCNv4, _extension, dcnv4, use_backend
from mmdcnv4.testing import GEOMETRIES, make_inputs

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
CALL = dict(kernel_size=(3, 3), groups=2, stride=(2, 1), padding=(1, 0), dilation=(1, 2),
            offset_scale=0.5, remove_center=False, softmax=False)
GEOMETRY = dict(groups=2, offset_scale=0.5, **GEOMETRIES['3x3-strided'])

pytestmark = [pytest.mark.usefixtures('native'), pytest.mark.hostile]


def inputs(dtype=F32, mask_dtype=None):
    return make_inputs(2, 5, 7, 4, dtype=dtype, mask_dtype=mask_dtype, **GEOMETRY)


def leaves(dtype=F32, mask_dtype=None):
    return inputs(dtype, mask_dtype).leaves(dtype, mask_dtype)


def is_short(*tensors, **changes):
    """Whether the short way takes the call."""
    out = _extension.call_dcnv4(*(tensors or inputs()), *{**CALL, **changes}.values())
    assert out is NotImplemented or isinstance(out, torch.Tensor)
    return out is not NotImplemented


@contextmanager
def counted(monkeypatch):
    """Counts the calls that take the short way."""
    count, real = Counter(), _extension.call_dcnv4

    def call(*arguments):
        out = real(*arguments)
        count['long' if out is NotImplemented else 'short'] += 1
        return out

    with monkeypatch.context() as patch:
        patch.setattr(_extension, 'call_dcnv4', call)
        yield count


class Subclass(torch.Tensor):
    """With its own opinion about torch functions."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize('changes', [
    {}, dict(kernel_size=[3, 3]), dict(kernel_size=3), dict(offset_scale=2), dict(softmax=True),
    dict(offset_scale=-1e300)])
def test_plain_scalars_take_the_short_way(changes):
    assert is_short(**changes)


@pytest.mark.parametrize('changes', [
    dict(kernel_size=np.int64(3)), dict(kernel_size=torch.Size([3, 3])), dict(kernel_size=(3., 3.)),
    dict(kernel_size=(3, True)), dict(kernel_size=True), dict(kernel_size=(3, 3, 3)),
    dict(kernel_size=None), dict(kernel_size='33'), dict(stride=(2**63, 1)), dict(stride=2**200),
    dict(padding=(1, None)), dict(dilation=[1]), dict(groups=2.0), dict(groups=True),
    dict(groups=2**64), dict(groups=np.int32(2)), dict(offset_scale='1'), dict(offset_scale=True),
    dict(offset_scale=np.float32(1)), dict(offset_scale=torch.tensor(1.)), dict(offset_scale=2**70),
    dict(remove_center=0), dict(softmax=None), dict(more=1)])
def test_other_scalars_do_not(changes):
    assert not is_short(**changes)


@pytest.mark.parametrize('dtype, mask_dtype, is_autocast, expected', [
    (F32, F32, False, True), (F64, F64, False, True), (F16, F16, False, True),
    (BF16, F32, False, True), (F32, BF16, False, False), (F64, F32, False, False),
    (F16, BF16, False, False), (F32, F64, False, False), (F32, BF16, True, True),
    (F16, BF16, True, True), (F64, F32, True, False), (F32, F32, True, True)])
def test_dtypes(dtype, mask_dtype, is_autocast, expected):
    with torch.autocast('cpu', BF16, enabled=is_autocast):
        assert is_short(*inputs(dtype, mask_dtype)) == expected


def test_tensors():
    value, offset_mask = inputs()
    assert is_short(torch.nn.Parameter(value), offset_mask)
    for pair in ((value.to('meta'), offset_mask.to('meta')), (value.numpy(), offset_mask),
                 (value.as_subclass(Subclass), offset_mask), (value, None),
                 (value, offset_mask.as_subclass(Subclass))):
        assert not is_short(*pair)


class Mode(TorchFunctionMode):
    """Passes everything on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_that_must_see_the_call():
    value, offset_mask = inputs()
    with Mode():
        assert not is_short()
    with torch.device('cpu'):
        assert not is_short()
    with forward_ad.dual_level():
        assert is_short()
        assert not is_short(forward_ad.make_dual(value, value), offset_mask)
        assert not is_short(value, forward_ad.make_dual(offset_mask, offset_mask))
    seen = []
    torch.func.vmap(lambda v: (seen.append(is_short(v, offset_mask)), v)[1])(value[None])
    torch.func.grad(lambda v: (seen.append(is_short(v, offset_mask)), v.sum())[1])(value)
    assert seen == [False, False]
    assert is_short()  # and none of them lasts


def test_public_function_and_layer_take_the_short_way(monkeypatch):
    layer = DCNv4(8, group=2)
    with counted(monkeypatch) as count:
        dcnv4(*inputs(), **GEOMETRY)
        layer(torch.randn(2, 5, 7, 8))
        with torch.autocast('cpu', BF16):
            layer(torch.randn(2, 5, 7, 8))
        dcnv4(*inputs(), backend='native', **GEOMETRY)
        assert count == {'short': 4}
        dcnv4(*inputs(), backend='pytorch', **GEOMETRY)
        with use_backend('pytorch'):
            layer(torch.randn(2, 5, 7, 8))
        assert count == {'short': 4}  # it was not asked
        dcnv4(*inputs(F32, BF16), **GEOMETRY)
        assert count == {'short': 4, 'long': 1}


def python_calls(function):
    """Python functions that a call enters."""
    function()
    entered = []

    def profile(frame, event, argument):
        if event == 'call':
            entered.append(frame.f_code.co_qualname if hasattr(frame.f_code, 'co_qualname')
                           else frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return entered


def test_little_python_runs_per_call():
    """What a call costs the host, in a number that does not depend on the machine.

    `benchmarks/host_time.py` measures it. Each function entered takes a tenth of a microsecond or
    more; a parse of the geometry would be a dozen.
    """
    tensors, layer, x = leaves(), DCNv4(8, group=2), torch.randn(2, 5, 7, 8)
    assert len(python_calls(lambda: dcnv4(*tensors, **GEOMETRY))) <= 5
    linears = (layer.value_proj, layer.offset_mask, layer.output_proj)
    alone = len(python_calls(lambda: [linear(x) for linear in linears]))
    assert len(python_calls(lambda: layer(x))) <= alone + 12


def test_one_dispatcher_call_per_direction():
    value, offset_mask = leaves()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dcnv4(value, offset_mask, **GEOMETRY).backward(torch.ones(2, 3, 3, 8))
    events = Counter(event.name for event in profile.events())
    assert events['mmdcnv4::dcnv4'] == events['mmdcnv4::_dcnv4_backward'] == 1
    assert not {name for name in events if name.startswith('aten::')} & {
        'aten::to', 'aten::_to_copy', 'aten::contiguous', 'aten::zeros', 'aten::copy_'}


def run(call, tensors, context=nullcontext):
    """Output and gradients of one call, as far as there are any."""
    with context():
        out = call(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    weight = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, weight)] if wanted else [out]


def call(value, offset_mask):
    return dcnv4(value, offset_mask, **GEOMETRY)


@pytest.mark.parametrize('wanted', [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize('dtype, mask_dtype', [(F32, F32), (F64, F64), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize('is_autocast', [False, True])
@pytest.mark.parametrize('is_dense', [False, True])
def test_both_ways_agree(monkeypatch, wanted, dtype, mask_dtype, is_autocast, is_dense):
    """Also for each subset of tensors that require gradients, and for strided ones."""
    tensors = list(inputs(dtype, mask_dtype))
    if not is_dense:
        tensors = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in tensors]
    tensors = [tensor.requires_grad_(number in wanted) for number, tensor in enumerate(tensors)]

    def context():
        return torch.autocast('cpu', BF16, enabled=is_autocast)

    with counted(monkeypatch) as count:
        short = run(call, tensors, context)
        assert count == {'short': 1}
    with monkeypatch.context() as patch:
        patch.setattr(_extension, 'call_dcnv4', lambda *arguments: NotImplemented)
        long = run(call, tensors, context)
    assert len(short) == 1 + len(wanted)
    for a, b in zip(short, long):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with torch.no_grad(), context():
        out = call(*tensors)
        assert torch.equal(out, short[0]) and not out.requires_grad


@pytest.mark.parametrize('argument, changes, exception, message', BOTH, ids=names(BOTH))
def test_both_ways_refuse_alike(monkeypatch, argument, changes, exception, message):
    texts = []
    for answer in (_extension.call_dcnv4, lambda *arguments: NotImplemented):
        monkeypatch.setattr(_extension, 'call_dcnv4', answer)
        with pytest.raises(exception) as caught:
            dcnv4(**arguments(changes))
        texts.append((caught.type, str(caught.value)))
    assert texts[0] == texts[1]


def test_the_warning_about_the_slow_path_names_the_line_of_the_caller(monkeypatch):
    monkeypatch.setattr(_extension, '_warned', set())
    tensors = inputs()
    with forward_ad.dual_level(), pytest.warns(RuntimeWarning, match='forward-mode') as caught:
        call(forward_ad.make_dual(tensors[0], tensors[0]), tensors[1])
    assert caught[0].filename == __file__


# What autograd offers around an operator


def squared_gradients(function):
    tensors = leaves()
    return torch.autograd.grad(function(*tensors).square().sum(), tensors)


def test_saved_tensors_pass_through_hooks():
    packed, tensors = [], leaves()

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (packed.append(tensor.shape), tensor.clone())[1], lambda tensor: tensor)

    actual = run(call, tensors, hooks)
    assert packed == [tensor.shape for tensor in tensors]
    assert all(map(torch.equal, actual, run(call, leaves())))


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpointing(use_reentrant):
    tensors = leaves()
    checkpoint(call, *tensors, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, expected in zip(tensors, squared_gradients(call)):
        assert torch.equal(tensor.grad, expected)


def test_an_input_changed_in_place_is_noticed():
    value, offset_mask = leaves()
    copy = value * 1
    out = call(copy, offset_mask)
    copy.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_second_backward_through_the_same_graph():
    tensors = leaves()
    out = call(*tensors).sum()
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, tensors)))
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        out.backward()


def test_inference_mode():
    tensors = leaves()
    with torch.inference_mode():
        out = call(*tensors)
        kept = tensors.value * 1
    assert out.is_inference() and torch.equal(out, call(*tensors).detach())
    with pytest.raises(RuntimeError, match='Inference tensors cannot be saved for backward'):
        call(kept, tensors.offset_mask)


def test_nan_gradients_arrive_and_anomaly_detection_names_the_operator():
    tensors = leaves()
    out = call(*tensors)
    grads = torch.autograd.grad(out, tensors, torch.full_like(out, float('nan')))
    assert all(grad.isnan().any() for grad in grads)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match='Dcnv4Function.* nan values'):
        warnings.simplefilter('ignore')
        with torch.autograd.detect_anomaly():
            out = call(*tensors)
            out.backward(torch.full_like(out, float('nan')))


def test_gradients_of_an_output_that_is_not_used():
    """Autograd hands over an undefined gradient then; nothing is computed from it."""
    tensors = leaves()
    unused = call(*tensors)
    grads = torch.autograd.grad((tensors.value * 2).sum() + 0 * unused.detach().sum(), tensors,
                                allow_unused=True)
    assert grads[0].eq(2).all() and grads[1] is None


def test_compiled_autograd():
    """The backward pass as a graph; each geometry keeps its own scalars."""
    from torch._dynamo import compiled_autograd
    # torch 2.4 has it without the underscore
    enable = getattr(compiled_autograd, '_enable', None) or compiled_autograd.enable
    torch._dynamo.reset()
    for scale in (0.5, 0.25, 2.0):
        tensors = leaves()
        geometry = {**GEOMETRY, 'offset_scale': scale}
        expected = torch.autograd.grad(dcnv4(*tensors, **geometry).sum(), tensors)
        out = dcnv4(*tensors, **geometry).sum()
        with enable(torch.compile(backend='aot_eager', fullgraph=True)):
            out.backward()
        for tensor, grad in zip(tensors, expected):
            torch.testing.assert_close(tensor.grad, grad)
    torch._dynamo.reset()


def test_forward_mode_of_the_operator_itself():
    """`torch.ops` has no PyTorch path to fall back to: an error, not a tangent that is lost."""
    value, offset_mask = inputs()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='forward-mode'):
        torch.ops.mmdcnv4.dcnv4(forward_ad.make_dual(value, value), offset_mask, *CALL.values())


@pytest.mark.parametrize('dw_kernel_size', [None, 3])
def test_compile_and_export_of_a_layer_that_keeps_the_size(dw_kernel_size):
    """No geometry is parsed and no size computed in it, compiled or not."""
    torch._dynamo.reset()
    layer = DCNv4(8, group=2, dw_kernel_size=dw_kernel_size, mask_init=0.1)
    torch.nn.init.normal_(layer.offset_mask.weight, std=0.1)
    x = torch.randn(2, 5, 7, 8)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,))
    assert 'mmdcnv4.dcnv4.default' in [str(node.target) for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(x), layer(x))
    torch._dynamo.reset()


# Who must see the call


def test_subclasses_and_modes_see_the_call():
    Subclass.seen.clear()
    value, offset_mask = inputs()
    out = call(value.as_subclass(Subclass), offset_mask)
    assert type(out) is Subclass and any('mmdcnv4.dcnv4' in name for name in Subclass.seen)
    assert torch.equal(out.as_subclass(torch.Tensor), call(value, offset_mask))
    names_seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names_seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        call(value, offset_mask)
    assert any('mmdcnv4.dcnv4' in name for name in names_seen)


def test_wrapper_subclass():
    """A subclass that acts in `__torch_dispatch__`, forward and backward."""
    from torch.testing._internal.two_tensor import TwoTensor
    value, offset_mask = inputs()
    wrapped = TwoTensor(value, 2 * value).requires_grad_()
    out = call(wrapped, TwoTensor(offset_mask, offset_mask))
    assert isinstance(out, TwoTensor)
    torch.testing.assert_close(out.b, 2 * out.a)
    out.sum().backward()
    assert isinstance(wrapped.grad, TwoTensor)


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_jit_trace_records_the_call():
    traced = torch.jit.trace(call, tuple(inputs()))
    assert 'mmdcnv4::dcnv4' in str(traced.graph)
    value, offset_mask = leaves()
    assert torch.equal(traced(value + 1, offset_mask), call(value + 1, offset_mask))
    assert torch.autograd.grad(traced(value, offset_mask).sum(), value)[0].abs().sum() > 0


def longest_pause(function):
    """The longest time for which another thread does not run, over the time of a call."""
    ticks, is_done = [], threading.Event()

    def clock():
        while not is_done.wait(0.0005):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=clock)
    thread.start()
    begin = time.perf_counter()
    function()
    end = time.perf_counter()
    is_done.set()
    thread.join()
    stamps = [begin, *(tick for tick in ticks if begin < tick < end), end]
    return max(after - before for before, after in zip(stamps, stamps[1:])) / (end - begin)


def test_other_threads_run_meanwhile():
    """The interpreter is not locked while the kernel runs."""
    value, offset_mask = torch.zeros(4, 64, 64, 512), torch.zeros(4, 64, 64, 248)

    def call():
        dcnv4(value, offset_mask, kernel_size=9, groups=1, padding=4)

    # a busy machine may stop a thread as well, but not every time for most of the call
    assert any(longest_pause(call) < 0.5 for _ in range(10))


def test_calls_of_several_threads_at_once():
    expected, right = call(*inputs()), []

    def work():
        tensors = inputs()
        right.extend(torch.equal(call(*tensors), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 200


def test_an_extension_without_the_short_way_is_refused(monkeypatch):
    """Built from older sources it would have no gradient either."""
    monkeypatch.setitem(sys.modules, 'mmdcnv4._C', ModuleType('mmdcnv4._C'))
    extension = execute_again(_extension)
    assert not extension.is_available and extension.build_info == {}
    assert 'older than the Python files' in extension.missing_reason
    assert extension.call_dcnv4() is NotImplemented
