# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A malicious file at every place that reads a pickle, a torch file or YAML: nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmengine.config import Config
from mmengine.fileio.handlers import registry_utils

from mmdcnv4.cli.checkpoints import adopt_saved_seed, allow_mmengine_checkpoints
from mmdcnv4.cli.config import read_config
from mmdcnv4.cli.explain import hint
from mmdcnv4.cli.preflight import read_shapes
from mmdcnv4.errors import InvalidValue, UserError
from mmdcnv4.models.checkpoint import load_pretrained
from mmdcnv4.safe_files import load_infos, load_pickle, read_safely


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path):
    yield tmp_path / 'trace'
    assert not (tmp_path / 'trace').exists(), 'code of the file was run'


@pytest.fixture
def safe_handlers():
    before = dict(registry_utils.file_handlers)
    read_safely()
    yield
    registry_utils.file_handlers.update(before)


def write_pickle(file, content):
    file.write_bytes(pickle.dumps(content))
    return str(file)


def write_torch(file, content, legacy=False):
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return str(file)


def test_the_file_is_malicious(tmp_path):
    """The test itself: read as pickle does, the file leaves a trace."""
    file = write_pickle(tmp_path / 'evil.pkl', Evil(tmp_path / 'other'))
    pickle.loads(Path(file).read_bytes())
    assert (tmp_path / 'other').exists()


def test_plain_data_passes():
    content = dict(a=[1, 2.5, 'x', None, True, b'b', (1, 2), {3}], b=OrderedDict(c=1j),
                   d=np.arange(6.0).reshape(2, 3), e=np.float32(2), f=torch.arange(3),
                   g=np.array(['a', 'bc']), h=torch.Size([1, 2]), i=np.zeros(3, bool))
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = load_pickle(io.BytesIO(pickle.dumps(content, protocol)), 'x')
        assert str(found) == str(content)


@pytest.mark.parametrize('module, name', [
    ('os', 'system'), ('posix', 'system'), ('builtins', 'eval'), ('builtins', 'getattr'),
    ('builtins', '__import__'), ('torch', 'load'), ('numpy', 'load'), ('numpy', 'fromfile'),
    ('torch.storage', '_load_from_byte'), ('functools', 'partial'), ('subprocess', 'Popen'),
    ('numpy.core.multiarray', 'fromfile'), ('torch.serialization', 'load'),
    ('numpy', 'ndarray.tofile'), ('collections', 'OrderedDict.pop'), ('__main__', 'x')])
def test_other_names_are_refused(module, name):
    content = pickle.PROTO + b'\x04' + pickle.SHORT_BINUNICODE + bytes([len(module)]) + \
        module.encode() + pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + \
        pickle.STACK_GLOBAL + pickle.STOP
    with pytest.raises(InvalidValue, match=f'{module}.{name}.*could run code'):
        load_pickle(io.BytesIO(content), 'x')


def test_a_tensor_that_hides_a_pickle_is_refused(trace):
    """torch unpickles the bytes of a storage again, without a limit."""
    inner = io.BytesIO()
    torch.save(Evil(trace), inner)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    with pytest.raises(InvalidValue, match='refused'):
        load_pickle(io.BytesIO(pickle.dumps(Storage())), 'x')


@pytest.mark.parametrize('content', [b'', b'\x80', b'hello', b'\x80\x04.', b'\x80\x04}r\xff'])
def test_what_is_no_pickle(content):
    with pytest.raises(InvalidValue, match='file x is'):
        load_pickle(io.BytesIO(content), 'x')


def test_info_files(tmp_path, trace, monkeypatch):
    file = write_pickle(tmp_path / 'infos.pkl', Evil(trace))
    with pytest.raises(InvalidValue, match=r'infos.pkl is refused.*mkdir'):
        load_infos(file)
    (tmp_path / 'infos.json').write_text('{"data_list": []}')
    assert load_infos(str(tmp_path / 'infos.json')) == {'data_list': []}
    monkeypatch.setenv('MMDCNV4_TRUST_FILES', '1')
    assert load_infos(write_pickle(tmp_path / 'own.pkl', Path('a'))) == Path('a')


def test_every_pickle_that_a_tool_reads_through_mmengine(tmp_path, trace, safe_handlers):
    import mmengine
    file = write_pickle(tmp_path / 'evil.pkl', Evil(trace))
    with pytest.raises(InvalidValue, match='the config names. is refused.*mkdir'):
        mmengine.load(file)
    mmengine.dump(dict(a=np.ones(2)), tmp_path / 'good.pickle')
    assert mmengine.load(tmp_path / 'good.pickle')['a'].tolist() == [1, 1]


def test_annotation_files(tmp_path, trace, safe_handlers):
    """Of an mmdet data set, whatever its format, and when the error is explained."""
    datasets = pytest.importorskip('mmengine.dataset')
    file = write_pickle(tmp_path / 'evil.pkl', Evil(trace))
    with pytest.raises(InvalidValue, match='refused'):
        datasets.BaseDataset(ann_file=file)
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='CocoDataset', ann_file=file))))
    try:
        json.loads(Path(file).read_bytes().decode('latin-1'))
    except json.JSONDecodeError as error:
        assert hint(error, cfg) is None


def test_temporal_infos(tmp_path, trace):
    pytest.importorskip('mmdet3d', reason='mmdet3d is not installed')
    from mmdcnv4.bevformer_v2.data.nuscenes_temporal import NuScenesTemporalDataset
    write_pickle(tmp_path / 'evil.pkl', Evil(trace))
    with pytest.raises(InvalidValue, match='refused'):
        NuScenesTemporalDataset(str(tmp_path), 'evil.pkl')


def test_predictions(tmp_path, trace):
    pytest.importorskip('pycocotools', reason='pycocotools is not installed')
    from mmdcnv4.cli import pictures
    file = write_pickle(tmp_path / 'predictions.pkl', Evil(trace))
    with pytest.raises(InvalidValue, match='refused'):
        pictures.read_predictions(Path(file))


@pytest.mark.parametrize('legacy', [False, True])
def test_checkpoints(tmp_path, trace, legacy):
    allow_mmengine_checkpoints()
    file = write_torch(tmp_path / 'evil.pth', dict(state_dict=Evil(trace)), legacy)
    with pytest.raises(InvalidValue, match='could run code'):
        read_shapes(file)
    cfg = Config(dict(resume=True, load_from=file))
    with pytest.raises(pickle.UnpicklingError):
        adopt_saved_seed(cfg)
    with pytest.raises(ValueError, match='evil.pth'):
        load_pretrained(torch.nn.Linear(1, 1), file)


def test_yaml_configs(tmp_path, trace):
    evil = tmp_path / 'evil.yaml'
    evil.write_text(f'model:\n  a: !!python/object/apply:os.mkdir ["{trace}"]\n')
    base = tmp_path / 'base.yml'
    base.write_text('_base_: evil.yaml\nmodel:\n  type: X\n')
    for file in (evil, base):
        with pytest.raises(UserError, match='python/object/apply:os.mkdir.*can run code'):
            read_config(str(file))
    good = tmp_path / 'good.yaml'
    good.write_text('model:\n  type: X\n  size: !!python/tuple [1, 2]\n')
    assert read_config(str(good)).model.size == (1, 2)
