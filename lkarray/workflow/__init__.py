"""The machinery every study uses: typed settings, resumable stages, a report, a lock."""

from lkarray.workflow.config import Config
from lkarray.workflow.report import Figure, Report, write_report
from lkarray.workflow.running import Run, Workflow, find_workflow, workflow_names

__all__ = [
    "Config",
    "Figure",
    "Report",
    "Run",
    "Workflow",
    "find_workflow",
    "workflow_names",
    "write_report",
]
