"""A run's folder as one HTML file, with nothing outside it: words, numbers, pictures, settings."""

from batchlr.report.page import write_report

__all__ = ["write_report"]
