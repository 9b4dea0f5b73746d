"""The sheet of a card: its ceilings, the GPU's tests, every kernel's error and time, the study."""

from bench.gpu_report.run import gpu_report

__all__ = ["gpu_report"]
