"""List the pretrained architectures that a training can start from, and why others cannot.

python -m inference.backbones --library timm
python -m inference.backbones --library torchvision --refused

Nothing is downloaded: the networks are built without numbers. timm is an extra: pip install 'pyro-isingvit[timm]'.
"""

from dataclasses import dataclass
from typing import Literal

from inference.cli import run_script


@dataclass(frozen=True)
class BackbonesArguments:
    """What to list."""

    library: Literal["timm", "torchvision"]
    """Whose architectures."""
    refused: bool = False
    """List those that cannot be converted, with the reason, in place of those that can."""


def backbones(arguments: BackbonesArguments) -> None:
    """List what --init takes, by name."""
    from tqdm.auto import tqdm

    from pyro_isingvit.nets.libraries import convertible

    library = arguments.library
    found = dict(tqdm(convertible(library), desc=library, unit="net", leave=False, dynamic_ncols=True))
    works = [name for name, why in found.items() if not why]
    print(f"{library}: {len(works)} of {len(found)} architectures work")
    if arguments.refused:
        print("\n".join(f"  {library}:{name}: {why}" for name, why in found.items() if why))
    else:
        print("\n".join(f"  {library}:{name}" for name in works))


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(backbones, BackbonesArguments, argv)


if __name__ == "__main__":
    main()
