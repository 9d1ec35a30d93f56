"""One place that prints a measured row and puts it into pytest-benchmark's JSON."""

from typing import Any

from prosocial_ext import bench


def report(benchmark: Any, row: bench.Row) -> None:
    """Print the row's line; store it under ``extra_info`` beside the machine it was measured on."""
    benchmark.extra_info.update(row=row.as_json(), machine=bench.machine())
    print("\n" + row.line())
