"""Substitute for torchvision in an SGLang server without a GPU.

The registry's torchvision wheels are CUDA builds: on a CPU build of torch their import fails, and then transformers'
fails too. SGLang imports a few names for image models at start-up; a language model never calls them. Only a server
process has this folder on its path, and only where there is no GPU: trainers run without any torchvision.
"""

__version__ = "0.0.0+stub"
