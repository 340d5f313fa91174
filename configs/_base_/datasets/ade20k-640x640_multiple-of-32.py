# mmseg's ADE20K, 8 GPUs x 2 images, tested at sizes that are multiples of 32.
_base_ = ['mmseg::_base_/datasets/ade20k_640x640.py', './ade20k-pipelines_640x640.py']

tta_pipeline = _base_.ade_tta_multiple
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=_base_.ade_train))
val_dataloader = dict(dataset=dict(pipeline=_base_.ade_test_multiple))
test_dataloader = val_dataloader
