"""Tables in long form: a row for each number, with its name in one column and its value in another."""

from collections.abc import Iterable

from stabrun.foreign import names
from stabrun.foreign.columns import Cells

NAMES = ("metric", "tag", "key", "name", "variable", "series", "metric_name")
VALUES = ("value", "metric_value", "scalar")


def melted(rows: list[Cells]) -> tuple[str, str] | None:
    """The columns of names and of values, if these rows are of a table in long form."""
    columns = {names.plain(name): name for row in rows for name in row if type(name) is str}
    name = next((columns[word] for word in NAMES if word in columns), None)
    value = next((columns[word] for word in VALUES if word in columns), None)
    if name is None or value is None:
        return None
    metrics = {metric for row in rows if isinstance(metric := row.get(name), str)}
    usual = any(names.is_training_loss(metric) or names.is_validation(metric) for metric in metrics)
    return (name, value) if usual else None


def pivoted(rows: Iterable[Cells], name: str, value: str) -> Iterable[Cells]:
    """The rows with each number under its name."""
    for row in rows:
        kept = {column: cell for column, cell in row.items() if column not in (name, value)}
        metric = row.get(name)
        yield {**kept, metric: row.get(value)} if isinstance(metric, str) and metric else kept
