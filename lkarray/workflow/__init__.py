"""The machinery every study uses: typed settings, resumable stages, a report, a lock."""

from lkarray.store.files import replacing
from lkarray.workflow.config import Config
from lkarray.workflow.report import Figure, Report, write_report
from lkarray.workflow.running import Run, Workflow, find_workflow, workflow_names
from lkarray.workflow.scheduling import Request, run_if_changed, run_in
from lkarray.workflow.study import Study, save_arrays

__all__ = [
    "Config",
    "Figure",
    "Report",
    "Request",
    "Run",
    "Study",
    "Workflow",
    "find_workflow",
    "replacing",
    "run_if_changed",
    "run_in",
    "save_arrays",
    "workflow_names",
    "write_report",
]
