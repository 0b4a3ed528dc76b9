"""Operations of the model with one implementation per kind of device; `kernels.dispatch` chooses and reports it.

Each has a plain-torch twin that is the oracle of its tests. Triton is imported only where a device needs it.
"""
