# mmseg's ADE20K, 8 GPUs x 2 images, with a multi-scale test relative to the test scale.
_base_ = ['mmseg::_base_/datasets/ade20k.py', './ade20k-pipelines_512x512.py']

tta_pipeline = _base_.ade_tta
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=_base_.ade_train))
val_dataloader = dict(dataset=dict(pipeline=_base_.ade_test))
test_dataloader = val_dataloader
