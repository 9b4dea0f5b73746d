"""What one wants to know of a GPU: ceilings, tests, every kernel's error and time, the study."""

from bench.gpu_report.run import gpu_report

__all__ = ["gpu_report"]
