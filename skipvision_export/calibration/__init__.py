"""Training-free choice of the layers and shares to skip, for checkpoints not trained with skipping."""

from skipvision_export.calibration.calibrate import Calibration, Settings, calibrate, plan
from skipvision_export.calibration.search import Budget, Point, lazy_greedy

__all__ = ["Budget", "Calibration", "Point", "Settings", "calibrate", "lazy_greedy", "plan"]
