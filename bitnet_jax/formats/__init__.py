"""Models in files and folders. Every format has a reader, `read(path) -> Weights`, and a writer, `write(path, weights, …) -> bytes`.

weights        a model leaf by leaf: what every reader gives and every writer takes
proof          that a conversion is the model it was made from
files          memory-mapped reading, writing whole or not at all
safetensors    the container of the next two

model_file     this project's own: one file, latent or packed, mapped and not copied
huggingface    folders of transformers: BitNetForCausalLM, LlamaForCausalLM, 1bitLLM's, TriLM's; hub: fetching them by name
gguf           files of bitnet.cpp, llama.cpp and ik_llama.cpp
stablehlo      compiled prefill and decode beside packed weights, with a runner that needs jax and numpy alone
orbax_folder   a parameter tree for other programs in JAX

Readers check everything that they can before they allocate: files come from strangers. `models.load` chooses the reader,
`conversion.convert` goes from any to any.
"""
