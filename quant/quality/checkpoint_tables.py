"""SQNR of a quantized checkpoint as tables."""

from __future__ import annotations

from ..quantized_checkpoint import QuantizedMetadata
from ..summary import FORMAT_NAMES, decibels
from .tables import markdown_table, text_table


def sqnr_tables(metadata: QuantizedMetadata, markdown: bool = False) -> str:
    """Write the SQNR of blocks and Linears."""
    table = markdown_table if markdown else text_table
    blocks = [(block.name, decibels(block.update_sqnr_db)) for block in metadata.blocks]
    linears = [
        (
            linear.name,
            FORMAT_NAMES[linear.format],
            decibels(linear.weight_sqnr_db),
            decibels(linear.output_sqnr_db),
        )
        for linear in metadata.linears
    ]
    return "\n\n".join(
        (
            table(("block", "its update"), blocks),
            table(("Linear", "format", "weight", "output"), linears),
        )
    )
