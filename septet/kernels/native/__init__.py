"""The CPU path: a native library (csrc/) called through ctypes."""
