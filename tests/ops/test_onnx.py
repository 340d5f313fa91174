# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Exported to ONNX and run by ONNX Runtime: the operator, and a backbone, at other sizes too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdcnv4.models.backbones import FlashInternImage
from mmdcnv4.ops import DCNv4, _extension, dcnv4, dcnv4_reference, use_backend
from mmdcnv4.ops import onnx as dcnv4_onnx
from mmdcnv4.testing import GEOMETRIES, make_inputs

runtime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytestmark = [pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels'),
              pytest.mark.filterwarnings('ignore')]  # of torch, about itself
FREE = {axis: torch.export.Dim.AUTO for axis in range(3)}  # batch, height, width


class Operator(nn.Module):
    """`dcnv4` with fixed scalars."""

    def __init__(self, **scalars):
        super().__init__()
        self.scalars = scalars

    def forward(self, value, offset_mask):
        return dcnv4(value, offset_mask, **self.scalars)


def session_of(file):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])


def run(session, *tensors):
    names = [entry.name for entry in session.get_inputs()]
    return [torch.as_tensor(out) for out in session.run(None, {
        name: tensor.numpy() for name, tensor in zip(names, tensors)})]


def export(model, tensors, file, free, opset_version=19):
    torch.onnx.export(model.eval(), tensors, str(file), dynamo=True, dynamic_shapes=free,
                      opset_version=opset_version, verbose=False,
                      custom_translation_table=dcnv4_onnx.translation_table())
    return session_of(file)


def with_offsets(model):
    """Samples between the pixels, and masks that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, DCNv4):
            for parameter in module.offset_mask.parameters():
                nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


@pytest.mark.parametrize('name', GEOMETRIES)
def test_one_node_computes_the_operator(name, tmp_path):
    """In float64, where a wrong order or factor cannot hide, and far outside the map as well."""
    scalars = dict(GEOMETRIES[name], groups=3)
    session = export(Operator(**scalars), tuple(make_inputs(2, 7, 9, 5, **scalars)),
                     tmp_path / 'operator.onnx', (FREE, FREE))
    for batch, height, width in ((2, 7, 9), (1, 7, 9), (3, 12, 8)):
        inputs = make_inputs(batch, height, width, 5, **scalars)
        out, = run(session, *inputs)
        expected = dcnv4_reference(*inputs, **scalars)
        # 25 taps, |mask| < 5, a slope below 10 per pixel, positions below 64 rounded to 53 bits
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-11)


@pytest.mark.parametrize('mask_dtype', [torch.float16, torch.float32])
def test_half_types_are_rounded_once(mask_dtype, tmp_path):
    scalars = dict(kernel_size=3, padding=1, groups=2, offset_scale=0.5)
    inputs = make_inputs(2, 7, 9, 4, dtype=torch.float16, mask_dtype=mask_dtype, **scalars)
    out, = run(export(Operator(**scalars), tuple(inputs), tmp_path / 'half.onnx', None), *inputs)
    wide = dcnv4_reference(*(tensor.double() for tensor in inputs), **scalars)
    assert out.dtype == torch.float16
    # half a unit in the last place of float16, and sums in float32
    torch.testing.assert_close(out.double(), wide, rtol=2 ** -11, atol=1e-5)


def test_backbone_at_other_sizes(tmp_path):
    backbone = with_offsets(FlashInternImage(channels=16, depths=[1, 1, 2, 1], groups=[1, 2, 4, 8],
                                             layer_scale=1.0))
    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    session = export(backbone, (torch.randn(2, 3, 64, 96),), tmp_path / 'backbone.onnx', (free,))
    for shape in ((2, 3, 64, 96), (1, 3, 97, 130)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = backbone(images)
        for out, level in zip(run(session, images), expected):
            # normalised numbers, below 10, after a hundred layers in float32
            torch.testing.assert_close(out, level, rtol=0, atol=1e-4)


def test_tracing_exporter_takes_plain_operators(tmp_path):
    """The older exporter of torch, which knows no table of translations."""
    layer, file = with_offsets(DCNv4(16, group=2)).eval(), tmp_path / 'layer.onnx'
    with use_backend('pytorch'), torch.no_grad():
        torch.onnx.export(layer, (torch.randn(2, 6, 7, 16),), str(file), dynamo=False,
                          opset_version=17, input_names=['x'],
                          dynamic_axes={'x': {0: 'batch', 1: 'height', 2: 'width'}})
    session = session_of(file)
    for shape in ((2, 6, 7, 16), (3, 9, 5, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(session, x)[0], layer(x), rtol=0, atol=1e-5)


def test_an_opset_without_the_node_is_an_error(tmp_path):
    with pytest.raises(Exception) as error:
        export(DCNv4(16, group=2), (torch.randn(1, 5, 5, 16),), tmp_path / 'old.onnx', None,
               opset_version=18)
    assert 'opset_version must be 19 or newer (DeformConv), got 18' in str(error.value)


def test_without_kernels_there_is_nothing_to_translate(monkeypatch):
    monkeypatch.setattr(_extension, 'is_available', False)
    monkeypatch.setattr(_extension, 'missing_reason', 'none were built')
    with pytest.raises(ImportError, match='needs the compiled kernels: none were built'):
        dcnv4_onnx.translation_table()
