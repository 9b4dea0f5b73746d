"""The GPU report: ceilings, tests, the error and time of every kernel, and the study."""

from bench.gpu_report.run import gpu_report

__all__ = ["gpu_report"]
