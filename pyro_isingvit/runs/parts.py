"""A long table that is written in parts, so that whoever is killed goes on with the parts that are left.

    X.parquet.parts/plan.json            what the table is of; other parts are never mixed with these
    X.parquet.parts/part-000007.parquet  some rows; absent where there are none
    X.parquet.parts/part-000007.json     sums over these rows, and the digest of the file; written last

The table itself appears once all parts are there, and the folder goes.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pyro_isingvit.core.checkpoint import remove_leftovers, write_atomically, write_json, write_text
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.data.cache import digest_of
from pyro_isingvit.predictive.table import Columns, csv_of, join_parquet, parquet, parquet_bytes

log = logging.getLogger(__name__)
SUFFIXES, PLAN = (".parquet", ".csv"), "plan.json"
Sums = dict[str, Any]


def listed_beside(out: Path) -> Path:
    """Where what could not be read is listed."""
    return out.with_name(f"{out.name}.unreadable.csv")


class Parts:
    """The parts of one table. To be used in a ``with`` block, which keeps other processes out.

    Args:
        out: the table, .parquet or .csv.
        plan: what it is made of, name -> text; finished parts are used if theirs is the same.
        count: number of parts.
        overwrite: replace the table, and parts of another plan.

    Raises:
        UserError: another suffix, a table that is there already, parts of another plan, another process that writes
            them, or a folder that cannot be written to.
    """

    def __init__(self, out: Path, plan: Mapping[str, str], count: int, overwrite: bool = False) -> None:
        import filelock

        need(out.suffix in SUFFIXES, f"`out` takes a file name that ends in {' or '.join(SUFFIXES)}, not {out}.")
        if out.suffix == ".parquet":
            parquet()
        self.out, self.count, self.folder = out, count, out.with_name(f"{out.name}.parts")
        self.waste = out.with_name(f".{self.folder.name}")
        shutil.rmtree(self.waste, ignore_errors=True)  # of a call that was killed when all was done
        ready = out.exists() and self._plan() == plan and not self.missing()  # killed once the table was written
        need(overwrite or ready or not out.exists(), f"{out} exists; name another `out` or set `overwrite`.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.folder / "lock")
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"another process is writing {out}; wait for it, or name another `out`.") from None
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder} ({error.strerror or why(error)}); name another `out`."
            ) from error
        try:
            remove_leftovers(out.parent, [out.name, listed_beside(out).name])
            self._agree(dict(plan), overwrite)
        except BaseException:
            self.lock.release()
            raise

    def _agree(self, plan: dict[str, str], overwrite: bool) -> None:
        there = self._plan()
        if there not in (None, plan):
            there = there if isinstance(there, dict) else {}
            other = [name for name in plan if there.get(name) != plan[name]]
            need(
                overwrite,
                f"{self.folder} holds parts of a table with other {', '.join(other) or 'contents'}; repeat that call, "
                "set `overwrite` to start over, or name another `out`.",
            )
            log.warning("%s: started over, since it was of other %s", self.folder, ", ".join(other) or "contents")
            for path in self.folder.glob("*part-*"):
                path.unlink()
        if there != plan:
            self._guarded(lambda: write_json(self.folder / PLAN, plan))

    def _plan(self) -> Any:
        """That of the parts that are there; None: there is none."""
        try:
            return json.loads((self.folder / PLAN).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return "damaged"

    def __enter__(self) -> "Parts":
        """The lock is held already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets others in; an interruption says how to go on."""
        self.lock.release()
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = (f"interrupted; run the same command again to go on: finished parts are in {self.folder}",)

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, or damaged."""
        return [number for number in range(self.count) if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        data, about = self._files(number)
        try:
            digest = json.loads(about.read_text())["digest"]
            return bool(digest == (digest_of(data).hex() if digest else ""))
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return False

    def write(self, number: int, columns: Columns | None, sums: Sums) -> None:
        """Keeps a part.

        Args:
            number: of the part.
            columns: its rows; None: it has none.
            sums: for ``sums``, as JSON can hold them.

        Raises:
            UserError: it cannot be written; what was there is unchanged.
        """
        data, about = self._files(number)

        def work() -> None:
            if columns is not None and data.suffix == ".parquet":
                content = parquet_bytes(columns)
                write_atomically(data, lambda temporary: temporary.write_bytes(content))
            elif columns is not None:
                write_text(data, csv_of(columns, header=False))
            digest = "" if columns is None else digest_of(data).hex()
            write_json(about, {"digest": digest, "columns": [] if columns is None else list(columns), "sums": sums})

        self._guarded(work)

    def sums(self) -> list[Sums]:
        """Of every part, in order."""
        return [json.loads(self._files(number)[1].read_text())["sums"] for number in range(self.count)]

    def finish(self, unreadable: Sequence[tuple[str, str]], about: Mapping[str, str]) -> None:
        """Writes the table and the list of what could not be read, and removes the parts.

        Args:
            unreadable: file and reason.
            about: metadata of a Parquet file.

        Raises:
            UserError: it cannot be written; the parts stay.
        """
        self.list_unreadable(unreadable)
        parts = [data for data, _ in map(self._files, range(self.count)) if data.exists()]
        self._guarded(lambda: write_atomically(self.out, lambda temporary: self._join(parts, temporary, about)))
        self.folder.rename(self.waste)  # at once: parts are there as a whole or not at all
        self.lock.release()
        shutil.rmtree(self.waste, ignore_errors=True)

    def list_unreadable(self, rows: Sequence[tuple[str, str]]) -> None:
        """Writes file and reason of each as CSV; without any, removes an older list."""
        path = listed_beside(self.out)
        if rows:
            columns = {"file": [name for name, _ in rows], "reason": [reason for _, reason in rows]}
            self._guarded(lambda: write_text(path, csv_of(columns)))
        else:
            path.unlink(missing_ok=True)

    def _join(self, parts: Sequence[Path], temporary: Path, about: Mapping[str, str]) -> None:
        if self.out.suffix == ".parquet":
            join_parquet(parts, temporary, about)
            return
        with temporary.open("wb") as file:
            header = json.loads(parts[0].with_suffix(".json").read_text())["columns"]
            file.write(csv_of({name: [] for name in header}).encode())
            for part in parts:
                with part.open("rb") as rows:
                    shutil.copyfileobj(rows, file)

    def _files(self, number: int) -> tuple[Path, Path]:
        data = self.folder / f"part-{number:06d}{self.out.suffix}"
        return data, data.with_suffix(".json")

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. Finished parts stay in {self.folder}: run the same command again to go on."
            ) from error
