_base_ = './bevformer-v2_flash-intern-image-s_t8_16xb1-24e_nus.py'

# The setting of the published test results: frames before and after, four seconds apart. How many
# on each side is not published; one is a guess.
frames = (-8, 0, 8)
model = dict(frames=frames)
train_dataloader = dict(dataset=dict(frames=frames))
val_dataloader = dict(dataset=dict(frames=frames))
test_dataloader = val_dataloader
