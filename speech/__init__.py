"""Speech recognition with frozen Whisper backbones."""
