"""Every public operation in float64 NumPy, directly from its definition; the oracle of the tests.

These functions work on features rather than Gram matrices, and import only NumPy. Their inputs are
validated NumPy arrays of any real dtype, without batch dimensions.
"""
