"""The sheet of a card: its ceilings, the GPU's tests, every kernel's error and time, the study."""

from bench.sheet.run import sheet

__all__ = ["sheet"]
