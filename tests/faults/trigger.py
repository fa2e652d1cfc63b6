"""How a test says what is to break in a running service, and when. injection/sitecustomize.py does it there."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.service.server import eventually

INJECTION = Path(__file__).parent / "injection"


@dataclass(frozen=True, slots=True)
class Triggers:
    """The folder in which a fault finds its trigger."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """What a server is started with so that its processes can be broken."""
        path = os.pathsep.join(filter(None, (str(INJECTION), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "FAULTS": str(self.folder), **more}

    def pull(self, fault: str, told: object = "", *, times: int = 1) -> None:
        """The next `times` times that a process comes to the place of `fault`, it happens."""
        being_written = self.folder / f".{fault}"
        being_written.write_text(f"{times} {told}")
        being_written.rename(self.folder / fault)

    async def taken(self, fault: str) -> None:
        """Return once a process has come to the place of `fault`."""

        async def is_taken() -> bool:
            return not (self.folder / fault).exists()

        await eventually(is_taken)
