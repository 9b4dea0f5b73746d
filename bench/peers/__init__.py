"""Other packages at the same jobs: the same inputs, answers that are compared, one run."""
