"""Triton kernels, installed as ``skd.kernels``; each is imported only when its backend is used."""
