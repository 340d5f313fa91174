# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What importing the package needs and does, each time in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDE = """
import sys, warnings
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.startswith({prefixes!r}) and name not in {but!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Hide())
"""
CALL = """
import torch
from mmdcnv4.ops import dcnv4
value, offset_mask = torch.randn(1, 4, 5, 6), torch.randn(1, 4, 5, 56)
def call(**options):
    return dcnv4(value, offset_mask, kernel_size=3, groups=2, padding=1, **options)
"""


def run(code):
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                            timeout=120)
    assert result.returncode == 0, result.stderr
    return result


def test_ops_need_torch_alone():
    """Every package whose name begins with mm is hidden, but this one."""
    hide = HIDE.format(prefixes=('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'), but=())
    run(hide + CALL + 'assert call().shape == (1, 4, 5, 6)\n'
        'assert not [name for name in sys.modules if name.startswith(("mmcv", "mmengine"))]\n'
        'from mmdcnv4 import registration\n'
        'assert "mmdcnv4.models.backbones" in registration.skipped\n'
        'assert "mmengine" in registration.skipped["mmdcnv4.engine"]')


def test_without_kernels_one_warning_and_the_same_values():
    run(HIDE.format(prefixes=('mmdcnv4._C',), but=()) + """
with warnings.catch_warnings(record=True) as at_import:
    warnings.simplefilter('always')
    import mmdcnv4.ops
assert not [w for w in at_import if 'mmdcnv4' in str(w.message)], at_import
""" + CALL + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    value.requires_grad_()
    out = call()
    call().sum().backward()
assert [w.category for w in caught] == [RuntimeWarning], caught
message = str(caught[0].message)
assert 'no C++ compiler or no torch, or MMDCNV4_NATIVE=0' in message
assert 'without compiled kernels' in message
assert 'pip install --no-build-isolation --editable .' in message
assert torch.equal(out, call(backend='pytorch')) and value.grad is not None
try:
    call(backend='native')
except NotImplementedError as error:
    assert 'without compiled kernels' in str(error)
else:
    raise AssertionError('backend="native" must fail without kernels')
""")


def test_kernels_of_another_torch_are_reported(tmp_path):
    """A `_C` that the dynamic linker refuses: the package works and the reason is kept."""
    broken = tmp_path / '_C.py'
    broken.write_text('raise ImportError("undefined symbol: _ZN3c105ErrorC2E")\n')
    run(f"""
import importlib.util, sys, warnings
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == 'mmdcnv4._C':
            return importlib.util.spec_from_file_location(name, {str(broken)!r})
sys.meta_path.insert(0, Broken())
""" + CALL + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    assert call().isfinite().all()
assert 'undefined symbol' in str(caught[0].message), caught
assert torch.__version__ in str(caught[0].message)
""")


def test_the_public_names():
    import mmdcnv4
    from mmdcnv4 import ops
    for name in ('DCNv4', 'dcnv4', 'dcnv4_reference', 'use_backend'):
        assert name in mmdcnv4.__all__ and getattr(mmdcnv4, name) is getattr(ops, name)
    assert all(hasattr(mmdcnv4, name) for name in mmdcnv4.__all__)
    assert (ROOT / 'mmdcnv4' / 'py.typed').is_file()


@pytest.mark.parametrize('package, left_out', [
    ('mmcv', {'mmdcnv4.models.backbones'}),
    ('mmengine', {'mmdcnv4.models.layers', 'mmdcnv4.models.losses', 'mmdcnv4.models.backbones',
                  'mmdcnv4.models.replacement', 'mmdcnv4.engine', 'mmdcnv4.registry',
                  'mmdcnv4.datasets.multi_scale'})])
def test_the_operator_works_beside_a_broken_package(tmp_path, package, left_out):
    """As built against another torch; what is not registered is told once, and by `info`."""
    (tmp_path / package).mkdir()
    (tmp_path / package / '__init__.py').write_text('raise OSError("undefined symbol: _ZN3c10")\n')
    run(f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from mmdcnv4 import dcnv4, info, registration
assert set(registration.skipped) == {left_out!r}, registration.skipped
assert set(registration.skipped.values()) == {{'OSError: undefined symbol: _ZN3c10'}}
messages = [str(w.message) for w in caught if 'not registered' in str(w.message)]
assert len(messages) == {len(left_out)}, messages
""" + CALL + """
assert call().shape == (1, 4, 5, 6)
assert info.report().count('OSError: undefined symbol') >= len(registration.skipped)
""")


def test_importing_the_package_imports_no_task_library():
    """What needs one, BEVFormer v2, is known all the same."""
    run('import sys, mmdcnv4\n'
        'assert mmdcnv4.__version__\n'
        'loaded = {name.split(".")[0] for name in sys.modules}\n'
        'assert not loaded & {"mmdet", "mmseg", "mmdet3d", "mmpretrain"}, loaded\n'
        'assert not mmdcnv4.registration.skipped, mmdcnv4.registration.skipped\n'
        'assert "mmdcnv4.bevformer_v2" not in sys.modules\n'
        'how = mmdcnv4.registration.on_demand()["mmdcnv4.bevformer_v2"]\n'
        'assert "custom_imports" in how or "not installed" in how, how\n'
        'from mmdcnv4.info import report\n'
        'assert how in report()')


def test_import_asks_for_no_device():
    code = ('import sys, torch\n'
            'for name in ("mmengine", "mmcv", "mmdet", "mmseg", "mmdet3d"):\n'
            '    sys.modules[name] = None\n'  # mmengine asks; this package must not
            'def refuse(*a, **k): raise AssertionError("a device was asked for")\n'
            'for name in ("get_device_capability", "get_device_properties", "device_count",\n'
            '             "is_available", "init", "_lazy_init"):\n'
            '    setattr(torch.cuda, name, refuse)\n'
            'import mmdcnv4.ops\n')
    run(code)


def test_sources_that_hide_an_installed_package_are_named(tmp_path, monkeypatch):
    """The folder of a clone comes first on the path, and has no kernels."""
    from importlib import metadata

    from mmdcnv4.ops import _extension
    library = tmp_path / 'mmdcnv4' / '_C.cpython-311-x86_64-linux-gnu.so'
    library.parent.mkdir()
    library.touch()
    info = tmp_path / 'mmdcnv4-0.1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: mmdcnv4\nVersion: 0.1.0\n')
    (info / 'RECORD').write_text(f'mmdcnv4/{library.name},,\n')
    monkeypatch.setattr(metadata, 'distribution', lambda name: metadata.PathDistribution(info))
    reason = _extension._shadowed()
    assert f'hide the installed package in {library.parent}' in reason and '--editable' in reason
    library.unlink()
    assert _extension._shadowed() is None
