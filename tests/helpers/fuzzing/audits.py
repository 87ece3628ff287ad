"""Calls of functions of audits."""

from __future__ import annotations

from collections.abc import Iterator

import lkarray as lk
from tests.helpers.fuzzing.world import Case, World


def _of_audits(w: World) -> Iterator[Case]:
    yield Case("completeness", lk.completeness, {"audit": w.audit})
    yield Case("concentration", lk.concentration, {"audit": w.audit})
    yield Case("net_influence", lk.net_influence, {"audit": w.audit, "cumulative": True})
    yield Case("gross_influence", lk.gross_influence, {"audit": w.audit, "cumulative": False})
    yield Case("most_influential", lk.most_influential, {"audit": w.audit, "k": 3, "by": "kind"})
    kernel = lk.lgk(w.now).compute()
    yield Case(
        "audit_modes", lk.audit_modes, {"kernel": kernel, "k": 3, "scale": 0.1, "memory": "64 MiB"}
    )
    yield Case(
        "extend_audit",
        lk.extend_audit,
        {"modes": w.trained, "cross": w.cross, "training": "example"},
    )
