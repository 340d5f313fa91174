_base_ = './bevformer-v2_r50_t1_16xb1-24e_nus.py'

frames = (-1, 0)  # key frames, half a second apart
model = dict(
    frames=frames,
    temporal_fusion=dict(
        type='TemporalFusion', bev_size=_base_.bev_size, norm_cfg=_base_.norm_cfg))
train_dataloader = dict(dataset=dict(frames=frames))
val_dataloader = dict(dataset=dict(frames=frames))
test_dataloader = val_dataloader
