"""Analysis of an audit's influence(example, audit): sums, the most influential, modes."""

from lkarray.analysis.audits.audit_modes import audit_modes, extend_audit
from lkarray.analysis.audits.influential import concentration, most_influential
from lkarray.analysis.audits.sums import completeness, gross_influence, net_influence

__all__ = [
    "audit_modes",
    "completeness",
    "concentration",
    "extend_audit",
    "gross_influence",
    "most_influential",
    "net_influence",
]
