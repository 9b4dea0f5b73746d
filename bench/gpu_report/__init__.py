"""The GPU report: ceilings, tests, the error and time of every kernel, and the study."""

from bench.gpu_report.run import measure_gpu

__all__ = ["measure_gpu"]
