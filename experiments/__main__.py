"""``python -m repsim_kernels.experiments``: the same command as ``repsim``."""

from repsim_kernels.experiments import main

if __name__ == "__main__":
    main()
