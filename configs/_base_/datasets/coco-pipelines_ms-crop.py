# The multi-scale crops of the COCO recipes, as one step of a pipeline.
resize = dict(
    type='RandomChoiceResize',
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True)
ms_crop = dict(
    type='RandomChoice',
    transforms=[
        [resize],
        [
            dict(
                type='RandomChoiceResize',
                scales=[(400, 1333), (500, 1333), (600, 1333)],
                keep_ratio=True),
            dict(
                type='RandomCrop',
                crop_type='absolute_range',
                crop_size=(384, 600),
                allow_negative_crop=True),
            resize,
        ],
    ])
