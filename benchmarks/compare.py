"""Is the package as fast as it was? Compares two JSON files of one benchmark, `cells.py` or `matrix.py`:

    python benchmarks/cells.py --repeats 5 --out new
    python benchmarks/compare.py benchmarks/releases/0.1.0/cells.json new.json

What counts is the share of the rate of a large product of matrices, which differs less between machines and minutes
than times do. Rows are compared that both files have.

Exit status: 0 if no share fell by more than `--most`, 1 if one did, 2 if the files have no row in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from helpers.contest import Table

Row = dict[str, Any]


class Change(NamedTuple):
    """A row that both files have, and its shares."""

    row: str
    old: float
    new: float

    @property
    def ratio(self) -> float:
        return self.new / self.old


def read(path: str) -> dict[str, Any]:
    """A file that `--out` wrote."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error
    if not isinstance(data, dict) or not {"command", "machine", "rows"} <= set(data):
        raise argparse.ArgumentTypeError(f"{path}: expected the JSON of a benchmark's --out, with rows")
    if not all("share" in row for row in data["rows"]):
        raise argparse.ArgumentTypeError(f"{path}: expected rows with a share, as cells.py and matrix.py write them")
    return data


def name(row: Row) -> str:
    """What was measured: all words and whole numbers of a row; the others are results."""
    parts = {key: value for key, value in row.items() if isinstance(value, str | int | list)}
    shown = {key: ",".join(map(str, each)) if isinstance(each, list) else each for key, each in parts.items()}
    return " ".join(f"{key}={each}" if isinstance(each, int) else str(each) for key, each in shown.items())


def changes(old: list[Row], new: list[Row]) -> list[Change]:
    """Of the rows that both have, the greatest fall first."""
    before = {name(row): row["share"] for row in old}
    found = [Change(name(row), before[name(row)], row["share"]) for row in new if name(row) in before]
    return sorted(found, key=lambda change: change.ratio)


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=read, help="JSON of a benchmark")
    parser.add_argument("new", type=read, help="JSON of the same benchmark, later")
    parser.add_argument("--most", type=float, default=0.1, help="fall that is no failure (default: %(default)s)")
    args = parser.parse_args(argv)
    found = changes(args.old["rows"], args.new["rows"])
    if not found:
        parser.error(f"no row in common: {args.old['command']}; {args.new['command']}")
    for which in "old", "new":
        print(f"{which}: {getattr(args, which)['machine']}")
    table = Table("row", "old share", "new share", "new / old")
    for change in found:
        table.add(change.row, f"{change.old:.1%}", f"{change.new:.1%}", change.ratio)
    fallen = [change for change in found if not change.ratio >= 1 - args.most]
    left = len(args.old["rows"]) - len(found)
    print(f"{len(fallen)} of {len(found)} shares fell by more than {args.most:.0%}; {left} were not measured again")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
