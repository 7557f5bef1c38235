"""The recipe that made the embedded model; nothing else needs it."""

from ..engine.terminal import quiet_libraries

quiet_libraries()
