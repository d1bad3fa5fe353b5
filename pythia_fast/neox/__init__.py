"""GPT-NeoX v1.0 checkpoints: `layout.py` says what they are; then `reader.py`, `writer.py`."""
