# Mask2Former on crops of 512 x 512: T.
_base_ = ['./mask2former_160k_ade20k.py', '../datasets/ade20k-pipelines_512x512.py']

# The names at the top are mmseg's: `inference_model` and other programs look there.
img_ratios = _base_.ade_ratios
train_pipeline = _base_.ade_train
test_pipeline = _base_.ade_test_multiple
tta_pipeline = _base_.ade_tta_multiple
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))  # mmseg: a choice of sizes
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
