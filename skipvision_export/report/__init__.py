"""One page of evidence as HTML, and its charts."""

from skipvision_export.report.render import render_report, speed_rows
from skipvision_export.report.token_maps import picture_cards

__all__ = ["picture_cards", "render_report", "speed_rows"]
