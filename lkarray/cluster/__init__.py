"""Clusters: `connect` to one of any kind, `check` what it can do before a long run.

>>> import lkarray as lk
>>> with lk.cluster.connect("local", workers=1, threads=1, memory="1 GiB") as client:
...     client.submit(sum, [1, 2, 3]).result()
6
"""

from lkarray.cluster.checking import Finding, check
from lkarray.cluster.connecting import connect
from lkarray.cluster.versions import refuse_mismatch

__all__ = ["Finding", "check", "connect", "refuse_mismatch"]
