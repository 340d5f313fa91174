# Pipelines for ADE20K with crops of 896 x 896, tested on whole images whose sides are stretched to
# multiples of 32; see ade20k-pipelines_640x640.py.
ade_scale = (3584, 896)
ade_multiple = dict(type='ResizeToMultiple', size_divisor=32)
ade_load_labels = dict(type='LoadAnnotations', reduce_zero_label=True)
ade_train = [
    dict(type='LoadImageFromFile'),
    ade_load_labels,
    dict(type='RandomResize', scale=ade_scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(896, 896), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
ade_test_multiple = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=ade_scale, keep_ratio=True),
    ade_multiple,
    ade_load_labels,  # after the resize: labels keep the size of the file
    dict(type='PackSegInputs'),
]
# The multi-scale test: ratios of the test scale, each also flipped.
ade_ratios = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
ade_scales = [
    dict(type='Resize', scale=(int(ade_scale[0] * ratio), int(ade_scale[1] * ratio)),
         keep_ratio=True)
    for ratio in ade_ratios
]
ade_flips = [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)]
ade_tta_multiple = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[ade_scales, [ade_multiple], ade_flips, [ade_load_labels],
                    [dict(type='PackSegInputs')]]),
]
