# Mask2Former on crops of 512 x 512: T.
_base_ = ['./mask2former_160k_ade20k.py', '../datasets/ade20k-pipelines_512x512.py']

tta_pipeline = _base_.ade_tta_multiple
train_dataloader = dict(dataset=dict(pipeline=_base_.ade_train))  # mmseg: a choice of sizes
val_dataloader = dict(dataset=dict(pipeline=_base_.ade_test_multiple))
test_dataloader = val_dataloader
