"""`--mode doctor`: finds before training what would stop or spoil it."""

from lg.tools.doctor.checkup import check_up
from lg.tools.doctor.findings import PROBLEM, Finding, report

__all__ = ["PROBLEM", "Finding", "check_up", "report"]
