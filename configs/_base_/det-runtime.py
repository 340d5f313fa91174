# Runtime of the detection recipes: mmdet's, with the newest and the best checkpoint kept.
_base_ = ['mmdet::_base_/default_runtime.py', './plugin.py']

default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='auto'))
