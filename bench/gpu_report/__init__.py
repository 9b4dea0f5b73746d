"""The GPU report: ceilings, every kernel's error and time, the study, other packages, tests."""

from bench.gpu_report.run import measure_gpu

__all__ = ["measure_gpu"]
