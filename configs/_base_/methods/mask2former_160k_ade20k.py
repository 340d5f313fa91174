# mmseg's Mask2Former with the training of the FlashInternImage recipes; crop size to be set.
_base_ = 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py'
# The pixel decoder and the losses are mmdet's.
custom_imports = dict(imports=['mmdcnv4', 'mmdet.models'], allow_failed_imports=False)

# Images are stretched, not padded, to multiples of 32 in the test.
model = dict(data_preprocessor=dict(test_cfg=None))

optim_wrapper = dict(
    clip_grad=dict(max_norm=0.1),  # mmseg: 0.01
    # The depths are read from the backbone. As in the published recipe the embeddings of the
    # head learn at the rate of the stem; `head_embed_decay=False` would change that.
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the backbone at a tenth of the rate, no weight decay of embeddings
        layer_decay_rate=1.0))
# The warm-up multiplies the decay; mmseg has no warm-up and a power of 0.9.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))  # mmseg: keeps all
