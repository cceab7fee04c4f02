"""One file for each format of model files. Readers check everything they can before they allocate.

model_file   this project's own: one safetensors file, latent or packed
"""
