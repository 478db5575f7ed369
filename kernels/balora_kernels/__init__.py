"""The Triton kernels of balora and their launchers. Imports torch and triton only, and nothing of `balora`."""
