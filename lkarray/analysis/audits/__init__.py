"""What an audit says: its completeness, sums and ends of influence(example, audit), its modes."""

from lkarray.analysis.audits.audit_modes import audit_modes, extend_audit
from lkarray.analysis.audits.completeness import completeness
from lkarray.analysis.audits.concentration import concentration
from lkarray.analysis.audits.influence_sums import gross_influence, net_influence
from lkarray.analysis.audits.most_influential import most_influential

__all__ = [
    "audit_modes",
    "completeness",
    "concentration",
    "extend_audit",
    "gross_influence",
    "most_influential",
    "net_influence",
]
