"""The HTML report of a demo."""

from skipvision_export.report.render import render_report, speed_rows

__all__ = ["render_report", "speed_rows"]
