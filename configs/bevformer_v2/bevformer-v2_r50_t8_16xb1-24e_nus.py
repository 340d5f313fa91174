_base_ = './bevformer-v2_r50_t2_16xb1-24e_nus.py'

frames = (-7, -6, -5, -4, -3, -2, -1, 0)  # key frames, half a second apart
model = dict(frames=frames, temporal_fusion=dict(inter_channels=512))
train_dataloader = dict(dataset=dict(frames=frames))
val_dataloader = dict(dataset=dict(frames=frames))
test_dataloader = val_dataloader
