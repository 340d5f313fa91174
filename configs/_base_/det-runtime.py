# Runtime of the detection recipes: mmdet's, with the newest and the best checkpoint kept.
_base_ = ['mmdet::_base_/default_runtime.py', './plugin.py']

# The recipe keeps 1, but MMEngine deletes it before the next one is written: a kill loses both.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
