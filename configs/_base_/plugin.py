# Makes the classes of this package known to every OpenMMLab library by their type names.
custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)
