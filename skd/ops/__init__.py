"""Operations: one file each, with its backends and, if compilers meet it, torch.library schema and autograd."""
