"""What is wrong with the memory of a recurrent model: probes, and a verdict."""

from __future__ import annotations

from statewright.diagnosis.diagnosis import Diagnosis, diagnose
from statewright.diagnosis.reading import Reading, read
from statewright.diagnosis.remembrance import remembrance
from statewright.diagnosis.verdict import VERDICTS, Verdict, judge

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
