"""The bundled model, as package data. Knows where it lies and nothing else."""

from pathlib import Path

MIXTRAL_MINI = Path(__file__).resolve().parent / "mixtral-mini"
