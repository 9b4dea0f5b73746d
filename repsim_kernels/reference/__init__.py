"""Every public operation in float64 NumPy, directly from its definition; the oracle of the tests.

It works on features and imports only NumPy. Inputs are validated NumPy arrays of any real dtype,
without batch dimensions.
"""
