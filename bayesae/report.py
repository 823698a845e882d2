"""What every recipe shares: flags, records, tables, and the tables of a page made anew from records.

``python -m bayesae.report README.md`` rewrites each block between ``<!-- table: FILE.json metrics=["a", "b"] -->`` and
``<!-- /table -->`` from the records in FILE.json (relative to the page), so that a number in a page always comes from
a run. The options are those of `table`, as JSON. A file of comparisons, ``{"environment": ..., "records": [{...}]}`` as
the benchmarks write it, gives one line a record with the fields ``columns=["question", "peer", ...]``, of the records
that have a value in the field ``having="ratio"``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bayesae.errors import DataError

__all__ = ["Flags", "Record", "Records", "flags", "table", "update_page"]


@dataclass(frozen=True)
class Flags:
    """The flags of a recipe.

    Args:
        fast: A run of seconds that checks the code and not the claim.
        full: All rows of the data in place of the recipe's subset.
        seeds: One run each.
        methods: Only these (and the baseline they are compared with), or None for all.
        data: Data sets to run, in the recipe's order; empty for a recipe that has but one.
        json: Where records go, or None.
        figures: Folder of the figures.
    """

    fast: bool
    full: bool
    seeds: tuple[int, ...]
    methods: tuple[str, ...] | None
    data: tuple[str, ...]
    json: Path | None
    figures: Path


def flags(
    doc: str | None,
    *,
    seeds: Sequence[int] = (0,),
    has_full: bool = False,
    data: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> Flags:
    """Read the flags that all recipes understand.

    Args:
        doc: The recipe's docstring, shown by ``--help``.
        seeds: Default seeds.
        has_full: Whether there is more data than the recipe takes by default, and so a ``--full``.
        data: Names of the data sets, of which ``--data`` takes some. By default a run has the first, with ``--full``
            (or where there is none) all.
        argv: Arguments; the command line's if None.

    Returns:
        The flags.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a run of seconds that checks the code, not the claim")
    if has_full:
        parser.add_argument("--full", action="store_true", help="all rows of the data, not the recipe's subset")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="one run each")
    parser.add_argument("--methods", nargs="+", help="only these; records of others already in the file are kept")
    if data:
        parser.add_argument("--data", nargs="+", choices=data, help="run these data sets; other records are kept")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="folder of the figures")
    given = parser.parse_args(argv)
    is_full = has_full and given.full
    wanted = (data and given.data) or (data if is_full or not has_full else data[:1])
    return Flags(
        given.fast,
        is_full,
        tuple(given.seeds),
        given.methods and tuple(given.methods),
        tuple(name for name in data if name in wanted),
        given.json,
        given.figures,
    )


@dataclass(frozen=True)
class Record:
    """One number.

    Args:
        data: Data set, or a pair of them.
        setting: What else was varied.
        method: What was run.
        metric: What was measured.
        seed: Of the run.
        value: The number.
    """

    data: str
    setting: str
    method: str
    metric: str
    seed: int
    value: float

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """All but the value."""
        return self.data, self.setting, self.method, self.metric, self.seed


class Records:
    """Collects records, prints them as a table and writes them as JSON."""

    def __init__(self, rows: Iterable[Record] = ()) -> None:
        self.rows = list(rows)

    def add(self, *, data: str, setting: str, method: str, metric: str, seed: int, value: float) -> None:
        """Add one number."""
        self.rows.append(Record(data, setting, method, metric, seed, float(value)))

    def mean(self, **where: str | int) -> float:
        """Mean value of the records with these fields.

        Args:
            **where: Fields and what they must equal.

        Returns:
            The mean.

        Raises:
            DataError: If there is no such record.
        """
        if not (values := self.values(**where)):
            raise DataError("records to average", f"none with {where}", "Check the names.")
        return statistics.fmean(values)

    def values(self, **where: str | int) -> list[float]:
        """Values of the records with these fields, one a seed.

        Args:
            **where: Fields and what they must equal.

        Returns:
            The values; none if there is no such record.
        """
        return [row.value for row in self.rows if all(getattr(row, key) == want for key, want in where.items())]

    def expect(self, value: float, tolerance: float, **where: str | int) -> None:
        """Check that a mean is what the recipe's docstring says, and print it.

        Args:
            value: What is expected.
            tolerance: How far the mean may be from it.
            **where: As for `mean`.

        Raises:
            DataError: If it is further away: the claim did not reproduce.
        """
        found = self.mean(**where)
        name = ", ".join(str(part) for part in where.values())
        if abs(found - value) > tolerance:
            raise DataError(
                f"{value:g} ± {tolerance:g} for {name}", f"{found:.4g}", "The claim of this recipe did not reproduce."
            )
        print(f"as expected: {name} {found:.3f} (claimed {value:g} ± {tolerance:g})")

    def save(self, path: Path, *, keeps_others: bool = False) -> None:
        """Write a JSON list, one record a line.

        Args:
            path: The file; its folder is made.
            keeps_others: Keep what the file holds already, but for records of the same name and seed.
        """
        rows = {row.key: row for row in self.rows}
        if keeps_others and path.exists():
            rows = {row.key: row for row in Records.load(path).rows} | rows
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows.values())
        path.write_text(f"[\n{lines}\n]\n")

    @classmethod
    def load(cls, path: Path) -> Records:
        """Read what `save` wrote."""
        return cls(Record(**row) for row in json.loads(path.read_text()))


def table(
    records: Records,
    *,
    metrics: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    columns: Literal["metric", "method"] = "metric",
) -> str:
    """A Markdown table with mean and spread over seeds.

    Args:
        records: The records.
        metrics: Which metrics, in this order; all, in order of appearance, if None.
        methods: Which methods, likewise.
        settings: Which settings; all if None.
        data: Which data sets; all if None.
        seeds: Which seeds; all if None.
        columns: What goes across; the rest of (data, setting, method, metric) goes down, less what never varies.

    Returns:
        The table; cells are ``mean ± standard deviation`` (divisor n - 1) where there are several seeds.

    Raises:
        DataError: If no record has such a metric or method.
    """
    wanted = {"metric": metrics, "method": methods, "setting": settings, "data": data, "seed": seeds}
    known = {field: {getattr(row, field) for row in records.rows} for field in wanted}
    missing = [name for field, names in wanted.items() for name in names or () if name not in known[field]]
    if missing:
        raise DataError(f"names of {known}", f"{missing}", "Check the spelling.")
    rows = [row for row in records.rows if all(not w or getattr(row, k) in w for k, w in wanted.items())]
    across = list(wanted[columns] or dict.fromkeys(getattr(row, columns) for row in rows))
    down = [field for field in ("data", "setting", "method", "metric") if field != columns]
    down = [field for field in down if len({getattr(row, field) for row in rows}) > 1]
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        key = tuple(getattr(row, field) for field in down)
        cells.setdefault(key, {}).setdefault(getattr(row, columns), []).append(row.value)
    body = [[*key, *(_cell(values.get(column, [])) for column in across)] for key, values in cells.items()]
    return _markdown([*down, *across], body)


def _comparisons(records: Sequence[dict[str, Any]], columns: Sequence[str], having: str) -> str:
    """One line a record; numbers to three digits, nothing where there is none."""
    known = {field for record in records for field in record}
    missing = [field for field in (*columns, having) if field not in known]
    if missing:
        raise DataError(f"fields among {sorted(known)}", f"{missing}", "Check the spelling.")
    body = []
    for record in (one for one in records if one.get(having) is not None):
        values = [record.get(field) for field in columns]
        body.append(["" if v is None else _short(v) if isinstance(v, float) else str(v) for v in values])
    return _markdown(list(columns), body)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _markdown(header: list[str], body: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [[text.ljust(w) for text, w in zip(line, widths, strict=True)] for line in [header, *body]]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    style = ".0e" if 0 < abs(mean) < 5e-4 else ".3f" if abs(mean) < 10 else ".1f"
    return f"{mean:{style}}" + (f" ± {statistics.stdev(values):{style}}" if len(values) > 1 else "")


_BLOCK = re.compile(r"(<!-- table: (\S+)(.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)
_OPTION = re.compile(r"(\w+)=(\[.*?\]|\S+)")


def update_page(path: Path) -> bool:
    """Rewrite the tables of a Markdown page from the records that they name.

    Args:
        path: The page.

    Returns:
        Whether anything changed.
    """
    old = path.read_text()

    def fresh(match: re.Match[str]) -> str:
        options = {key: json.loads(value) for key, value in _OPTION.findall(match[3])}
        content = json.loads((path.parent / match[2]).read_text())
        if isinstance(content, dict):
            text = _comparisons(content["records"], **options)
        else:
            text = table(Records(Record(**row) for row in content), **options)
        return f"{match[1]}{text}\n{match[4]}"

    new = _BLOCK.sub(fresh, old)
    path.write_text(new)
    return new != old


if __name__ == "__main__":
    for page in sys.argv[1:]:
        print(f"{page}: {'rewritten' if update_page(Path(page)) else 'unchanged'}")
