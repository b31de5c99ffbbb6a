"""What a verification found: the judged numbers, the facts beside them, and how both are shown.

It knows no models. Written for people as a table, for machines as one JSON document.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_build.verify.thresholds import Check

RESULT_SCHEMA = 1

GOLDEN, LONG, REPEAT = "golden-prompts", "long-prompt", "repeat-prompt"
PARTS = (GOLDEN, LONG, REPEAT)
"""What can be left out; perplexity and layer errors cannot."""
NOT_JUDGED = "quality NOT judged: nothing was held against the source, --against DIR|HF_ID|demo does that"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verdict on one candidate.

    Attributes:
        candidate: what was verified, as the user named it.
        source: what it was held against; None where no source was at hand.
        checks: every number with a limit, in the table's order.
        facts: what was measured beside them, in the order it is shown (perplexities, tokens, digests, …).
        skipped: what was not measured, each with its reason.
        notes: further lines for people.
        quality_judged: whether the checks hold the candidate against its source. Where they do not, even a
            broken scale passes them.
    """

    candidate: str
    source: str | None
    checks: tuple[Check, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quality_judged: bool = True

    @property
    def passed(self) -> bool:
        """Whether every check passed; a verification without a check has not."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failure(self) -> str:
        """The failed checks in one line: found, expected, what to do about the first; "" if all passed."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return "" if self.checks else f"{self.candidate}: nothing was checked"
        found = ", ".join(
            f"{check.rule.title} is {check.rule.show(check.found)}, expected {check.bound}"
            for check in failed
        )
        return f"{self.candidate}: {found}; {failed[0].rule.todo}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "schema": RESULT_SCHEMA,
            "candidate": self.candidate,
            "source": self.source,
            "passed": self.passed,
            "quality_judged": self.quality_judged,
            "checks": {check.name: check.as_dict() for check in self.checks},
            "skipped": dict(self.skipped),
            **_json_value(self.facts),
        }

    def lines(self) -> Iterator[str]:
        """For people: a line a check, then what was not measured."""
        yield f"{self.candidate} against {self.source or 'no source'}"
        width = max((len(check.rule.title) for check in self.checks), default=0)
        for check in self.checks:
            verdict = "ok" if check.passed else "FAILED"
            found = check.rule.show(check.found)
            yield f"  {check.rule.title:<{width}}  {found:>14}  {check.bound:<20}  {verdict}"
        if not self.quality_judged:
            yield f"  {NOT_JUDGED}"
        yield from (f"  not measured: {what} ({why})" for what, why in self.skipped.items())
        yield from (f"  {note}" for note in self.notes)

    def joined(self, name: str, other: VerifyResult) -> VerifyResult:
        """This result with the checks of another, whose facts come under `name`."""
        return VerifyResult(
            self.candidate,
            self.source,
            self.checks + other.checks,
            {**self.facts, name: other.facts},
            {**self.skipped, **other.skipped},
            self.notes + other.notes,
            self.quality_judged or other.quality_judged,
        )


def _json_value(value: Any) -> Any:
    """The value with null for every number that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: _json_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
