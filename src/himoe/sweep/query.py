"""SQL over the table of a sweep, through DuckDB: the views `runs` and `curves`."""

from pathlib import Path
from typing import Any

from himoe.errors import ConfigError, MissingExtraError
from himoe.sweep.table import build_table, import_pyarrow, is_stale


def query(out: Path, sql: str) -> Any:
    """Return the answer as a pyarrow table; the table of the sweep is brought up to date first.

    Raises:
        ConfigError: what DuckDB says of a query that it cannot answer, in one line.
        RunFolderError: there is no sweep at `out`.

    Example: `query(Path("sweep"), "select name, cross_entropy from runs order by cross_entropy")`
    """
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtraError("duckdb", "sweep") from error
    import_pyarrow()
    out = Path(out)
    if not (out / "runs").is_dir() or is_stale(out):
        build_table(out)
    with duckdb.connect() as connection:
        for name in ("runs", "curves"):
            place = str(out / f"{name}.parquet").replace("'", "''")
            connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{place}')")
        try:
            answer = connection.sql(sql)
            if answer is not None:
                return answer.to_arrow_table()
        except duckdb.Error as error:
            raise ConfigError(f"query: {' '.join(str(error).split())}") from None
    raise ConfigError("query: empty; ask for something, as in: select name, cross_entropy from runs")
