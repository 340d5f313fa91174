# Mask2Former on crops of 640 x 640, with more queries and a wider pixel decoder: S, B, L.
_base_ = ['./mask2former_160k_ade20k.py', '../datasets/ade20k-pipelines_640x640.py']

crop_size = (640, 640)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(
        num_queries=200,
        pixel_decoder=dict(
            encoder=dict(layer_cfg=dict(ffn_cfg=dict(feedforward_channels=2048))))))

# The names at the top are mmseg's: `inference_model` and other programs look there.
img_ratios = _base_.ade_ratios
train_pipeline = _base_.ade_train
test_pipeline = _base_.ade_test_multiple
tta_pipeline = _base_.ade_tta_multiple
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))  # mmseg: a choice of sizes
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
