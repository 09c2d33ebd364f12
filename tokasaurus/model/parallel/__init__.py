"""Many ranks of one replica: which rank has which part of the model.

Importing this package, or ``stages``, loads no torch.
"""
