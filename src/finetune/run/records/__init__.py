"""What stages write and checks read, as types: every key by name, none that is not declared.

They are checked when written and when read (`finetune.run.evidence`), strictly: a number is no text, a missing key is
named. A key that an earlier version did not write is `NotRequired`, and says so.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, StringConstraints, with_config

record = with_config(ConfigDict(strict=True, extra="forbid"))
open_record = with_config(ConfigDict(strict=True, extra="allow"))  # a trainer's own numbers go with a step
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]  # UTC, ISO 8601
Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 as hexadecimal digits
