"""Every public operation in NumPy float64, from its definition: the oracle of the tests.

Feature side, without a trick, and importing NumPy only. Inputs are checked NumPy arrays of any
real dtype, without batch dimensions.
"""
