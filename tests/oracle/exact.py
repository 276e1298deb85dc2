"""A model without quantized weights: its products round no activations."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_exact(source: Path, target: Path) -> None:
    """Writes a copy of a GGUF file with its tensors dequantized to F32, which changes none of them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, f in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            writer.add_key_value(name, f.contents(), f.types[0], sub_type=f.types[-1] if len(f.types) > 1 else None)
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        writer.add_tensor(t.name, gguf.quants.dequantize(t.data, t.tensor_type).reshape(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
