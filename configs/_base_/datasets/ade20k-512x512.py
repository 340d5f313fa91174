# mmseg's ADE20K, 8 GPUs x 2 images, with a multi-scale test relative to the test scale.
_base_ = ['mmseg::_base_/datasets/ade20k.py', './ade20k-pipelines_512x512.py']

# The names at the top are mmseg's: `inference_model` and other programs look there.
img_ratios = _base_.ade_ratios
train_pipeline = _base_.ade_train
test_pipeline = _base_.ade_test
tta_pipeline = _base_.ade_tta
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
