# ConvNeXt on ImageNet-1K from scratch, as in mmpretrain's recipes of the plain network; the DCNv4
# paper changes the operator alone.
_base_ = './image-classifier_300e_in1k.py'

model = dict(
    backbone=dict(type='ConvNeXtDCNv4', out_indices=(3, ), gap_before_final_norm=True))

# for 32 GPUs x 128 images
auto_scale_lr = dict(base_batch_size=4096)
optim_wrapper = dict(optimizer=dict(lr=4e-3), clip_grad=None)
# A decay of 0.9999; the averaged weights are evaluated and saved.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
