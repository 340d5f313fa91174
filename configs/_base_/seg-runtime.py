# Runtime of the segmentation recipes: mmseg's.
_base_ = ['mmseg::_base_/default_runtime.py', './plugin.py']
