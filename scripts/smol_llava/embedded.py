"""The embedded model's modules that this one shares: its encoder, optimizer and GGUF writer."""

import sys
from pathlib import Path

# behind this folder's own modules: both have a train.py
sys.path.append(str(Path(__file__).parents[1] / "embedded_model"))

import gguf_writer
import modeling
from optim import Muon

__all__ = ["Muon", "gguf_writer", "modeling"]
