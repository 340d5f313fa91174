# The classes of this package, and those of BEVFormer v2, which need mmdet3d.
custom_imports = dict(imports=['mmdcnv4', 'mmdcnv4.bevformer_v2'], allow_failed_imports=False)
