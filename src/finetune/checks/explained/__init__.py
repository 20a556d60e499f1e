"""What each verdict measures, and why it fails: one table, by check. What to do about it is in `finetune.checks.remedies`."""

from __future__ import annotations

from finetune.checks.explained import answers, exports, files, measured, trained, weights
from finetune.checks.explained.entry import Explained as Explained

OF_CHECK: dict[str, dict[str, Explained]] = {
    "seal": files.SEAL,
    "records": files.RECORDS,
    "labels": trained.LABELS,
    "rows": trained.ROWS,
    "loss": trained.LOSS,
    "parameters": weights.PARAMETERS,
    "optimizer": weights.OPTIMIZER,
    "reports": files.REPORTS,
    "questions": answers.QUESTIONS,
    "learning": answers.LEARNING,
    "retention": answers.RETENTION,
    "preference": answers.PREFERENCE,
    "artifacts": files.ARTIFACTS,
    "memory": measured.MEMORY,
    "resume": measured.RESUME,
    "serving": measured.SERVING,
    "invariance": measured.INVARIANCE,
    "parity": exports.PARITY,
}
EXPLAINED: dict[str, Explained] = {name: entry for entries in OF_CHECK.values() for name, entry in entries.items()}
CHECK_OF: dict[str, str] = {name: check for check, entries in OF_CHECK.items() for name in entries}
