"""``report.html``: the results of a run as one page that needs no network."""

from common.report.page import render_report

__all__ = ["render_report"]
