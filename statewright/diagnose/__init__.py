"""What is wrong with the memory of a recurrent model: probes, and a verdict."""

from __future__ import annotations

from statewright.diagnose.diagnosis import Diagnosis, diagnose
from statewright.diagnose.reading import Reading, read
from statewright.diagnose.remembrance import remembrance
from statewright.diagnose.verdict import VERDICTS, Verdict, judge

__all__ = [
    "VERDICTS",
    "Diagnosis",
    "Reading",
    "Verdict",
    "diagnose",
    "judge",
    "read",
    "remembrance",
]
