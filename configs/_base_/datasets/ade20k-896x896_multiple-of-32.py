# mmseg's ADE20K, 16 GPUs x 1 image, tested at sizes that are multiples of 32.
_base_ = ['mmseg::_base_/datasets/ade20k.py', './ade20k-pipelines_896x896.py']

# The names at the top are mmseg's: `inference_model` and other programs look there.
crop_size = (896, 896)
img_ratios = _base_.ade_ratios
train_pipeline = _base_.ade_train
test_pipeline = _base_.ade_test_multiple
tta_pipeline = _base_.ade_tta_multiple
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
