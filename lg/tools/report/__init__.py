"""`--mode report`: one HTML file about one or several runs."""

from lg.tools.report.report import report
