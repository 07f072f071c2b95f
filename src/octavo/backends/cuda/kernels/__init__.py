"""The Triton kernels, one subject a module. Import a module only when a GPU, or Triton's interpreter, will run it."""
