"""The report of a detector's test: its callback, evaluation, figures, tables and shortcut probes."""

from callbacks.detector_report.report import DetectorReport

__all__ = ["DetectorReport"]
