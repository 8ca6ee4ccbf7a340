"""GGUF block types in torch: sizes and exact dequantisation. (Being written.)"""
