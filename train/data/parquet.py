"""Opens parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hyperalign.errors import HyperAlignError
from hyperalign.files import first_line


def open_parquet(path: Path) -> Any:
    """Returns a `pyarrow.parquet.ParquetFile`.

    Raises:
        HyperAlignError: pyarrow is missing, or the file is not a whole parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise HyperAlignError("Parquet files need pyarrow: pip install pyarrow, then run again.") from error
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise HyperAlignError(
            f"{path} is not a whole parquet file ({first_line(error)}). Download it again, or move it away."
        ) from error
