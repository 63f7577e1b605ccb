"""Adapters: choosing modules, LoRA layers, file formats."""
