# A ViT on ImageNet-1K from scratch, as in mmpretrain's recipes of DeiT; the DCNv4 paper changes the
# operator, and takes the mean over the map for the class token.
_base_ = './image-classifier_300e_in1k.py'

model = dict(backbone=dict(type='ViTDCNv4', out_type='avg_featmap'))

# 16 GPUs x 64 images; the learning rate is for 1024
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'.pos_embed': dict(decay_mult=0.0)}))
