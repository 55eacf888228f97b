"""The test suite on every supported Python with the oldest and the newest torch: ``make test-matrix``.

An interpreter that this machine lacks is named and skipped; the environments stay in .venv-matrix for the next time.
Arguments are given to pytest.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-matrix"
PYTHONS = ("3.12", "3.13")
PINNED = ("torch", "torchvision")  # at their lower bounds in pyproject.toml
PYTEST = ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]


def oldest() -> list[str]:
    """torch and torchvision at the lower bounds that pyproject.toml gives."""
    text = (ROOT / "pyproject.toml").read_text()
    return [f"{name}=={re.search(rf'"{name}>=([0-9.]+)"', text)[1]}.*" for name in PINNED]


def interpreters(version: str) -> Iterator[Path | str]:
    """Where Python ``version`` may be: on the path, or among a version manager's."""
    yield f"python{version}"
    manager = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from sorted(manager.glob(f"{version}*/bin/python3"), reverse=True)


def find(version: str) -> Path | str | None:
    """The first interpreter that really runs and has the version; a version manager's shims may not."""
    wanted = f"import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for candidate in interpreters(version):
        try:
            if subprocess.run([candidate, "-c", wanted], capture_output=True, check=False).returncode == 0:
                return candidate
        except OSError:
            continue
    return None


def run_tests(python: Path | str, name: str, pins: list[str], arguments: list[str]) -> bool:
    """Makes the environment, tests in it, and says whether all passed."""
    home = FOLDER / name
    if not (home / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", home], check=True)
    inside = str(home / "bin" / "python")
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", ".[test]", *pins]
    if subprocess.run(install, cwd=ROOT, check=False).returncode != 0:
        return False
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([inside, *PYTEST, *arguments], cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> None:
    """Runs every pair; exit code 1 if any failed, or if there was none to run."""
    outcomes = {}
    for version in PYTHONS:
        python = find(version)
        for label, pins in (("oldest", oldest()), ("newest", [])):
            name = f"python{version}-torch-{label}"
            if python is None:
                outcomes[name] = "skipped: no such Python here"
                continue
            print(f"== {name}", flush=True)
            outcomes[name] = "passed" if run_tests(python, name, pins, sys.argv[1:]) else "FAILED"
    for name, outcome in outcomes.items():
        print(f"{name:30} {outcome}")
    sys.exit("FAILED" in outcomes.values() or "passed" not in outcomes.values())


if __name__ == "__main__":
    main()
